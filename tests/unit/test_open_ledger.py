"""deployments.ingress: where the limits are kept."""

import pytest

from deployments.handles import LedgerPort
from deployments.quotas import open_ledger
from serve.admission.redis import RedisLedger
from serve.config import Ledger, Settings


REDIS = Settings(ledger=Ledger(redis_url_env="LIMITS_URL"))


def test_the_actor_unless_a_redis_is_named():
    assert isinstance(open_ledger(Settings()), LedgerPort)


async def test_the_redis_of_the_named_variable(monkeypatch):
    monkeypatch.setenv("LIMITS_URL", "redis://127.0.0.1:6379/0")
    ledger = open_ledger(REDIS)
    assert isinstance(ledger, RedisLedger)
    await ledger.aclose()


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(monkeypatch, value):
    monkeypatch.delenv("LIMITS_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("LIMITS_URL", value)
    with pytest.raises(RuntimeError, match="redis_url_env: the environment variable LIMITS_URL"):
        open_ledger(REDIS)

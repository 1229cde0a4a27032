"""Places of long replies."""

import pytest

from serve.config import Ingress, Jobs, Settings
from serve.errors import Overloaded, QuotaExceeded
from serve.flows.streams import Streams


@pytest.fixture
def streams():
    return Streams(
        Settings(jobs=Jobs(streams_max=2, stream_s=120), ingress=Ingress(requests_max=8))
    )


async def test_streams_are_capped_by_tenant(streams):
    with streams.open("acme"), streams.open("acme"):
        with pytest.raises(QuotaExceeded) as refused, streams.open("acme"):
            pytest.fail("one too many")
        assert refused.value.code == "streams"
        assert refused.value.retry_after_s == pytest.approx(120, abs=5)
        with streams.open("other"):
            pass
    with streams.open("acme"):
        assert streams.count == 1
    assert streams.count == 0


async def test_all_tenants_together_leave_half_of_the_replica_to_others(streams):
    with streams.open("a"), streams.open("a"), streams.open("b"), streams.open("b"):
        with pytest.raises(Overloaded) as refused, streams.open("c"):
            pytest.fail("one too many")
        assert refused.value.retry_after_s == pytest.approx(120, abs=5)
    with streams.open("c"):
        pass

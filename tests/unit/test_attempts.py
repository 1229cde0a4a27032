"""Tries inside a lease: how often, how long between them, and for which errors."""

import asyncio

import pytest
import stamina

from serve.errors import BadInput, ModelUnavailable, Overloaded, QuotaExceeded
from serve.flows.attempts import attempts


@pytest.fixture
def pauses(monkeypatch):
    """What was waited between tries, in seconds; nothing is."""
    waited = []

    async def record(seconds):
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    with stamina.set_testing(testing=False):
        yield waited


async def tried(errors):
    """Tries until no error is left; the tries that were made."""
    left, made = list(errors), 0
    async for attempt in attempts():
        with attempt:
            made += 1
            if left:
                raise left.pop(0)
    return made


async def test_what_passes_is_tried_again_after_one_two_and_four_seconds(pauses):
    assert await tried([ModelUnavailable("Gone.")] * 3) == 4
    for waited, least in zip(pauses, (1, 2, 4), strict=True):
        assert least <= waited <= min(least + 0.5, 4)


async def test_the_fourth_failure_is_the_lease_s(pauses):
    with pytest.raises(ModelUnavailable):
        await tried([ModelUnavailable("Gone.")] * 4)
    assert len(pauses) == 3


@pytest.mark.parametrize(
    "error",
    [BadInput("No."), Overloaded("Full."), QuotaExceeded("Much.", code="x", retry_after_s=1)],
    ids=lambda error: error.code,
)
async def test_what_does_not_pass_in_seconds_is_not_tried_again_here(pauses, error):
    with pytest.raises(type(error)):
        await tried([error])
    assert pauses == []

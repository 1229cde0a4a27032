"""What is refused while the index has no room for it."""

import pytest

from serve.errors import IndexUnavailable, Overloaded
from serve.flows.room import AWAY_S, away_s, check, hold
from serve.pressure import Pressure


class Writer:
    def __init__(self, pressure: Pressure | None) -> None:
        self._pressure = pressure

    async def pressure(self) -> Pressure:
        if self._pressure is None:
            raise IndexUnavailable("Away.")
        return self._pressure


FULL = Writer(Pressure(3.0))
PAUSED = Writer(Pressure(4.0, paused=True))
CROWDED = Writer(Pressure(tenants={"ann": 5.0}))
ROOM, AWAY = Writer(Pressure()), Writer(None)


@pytest.mark.parametrize(
    ("writer", "wait_s"), [(ROOM, 0), (FULL, 3), (PAUSED, 4), (CROWDED, 0), (AWAY, AWAY_S)]
)
async def test_claims_stop_while_there_is_no_room_for_anybody(writer, wait_s):
    assert await away_s(writer) == wait_s


@pytest.mark.parametrize("ask", [check, hold])
async def test_with_room_or_with_nobody_to_ask_work_goes_on(ask):
    for writer in (ROOM, AWAY):
        await ask(writer, "ann")
    await ask(CROWDED, "bob")


@pytest.mark.parametrize(
    ("ask", "writer", "error", "wait_s"),
    [
        (check, FULL, Overloaded, 3),
        (check, PAUSED, IndexUnavailable, 4),
        (check, CROWDED, Overloaded, 5),
        (hold, FULL, Overloaded, 3),
        (hold, PAUSED, Overloaded, 4),
        (hold, CROWDED, Overloaded, 5),
    ],
)
async def test_a_refusal_says_when_to_come(ask, writer, error, wait_s):
    with pytest.raises(error) as caught:
        await ask(writer, "ann")
    assert type(caught.value) is error
    assert caught.value.retry_after_s == wait_s

"""What `tests/contract/test_ledger_contract.py` cannot show of the bank: its bounds, its time."""

import pytest

from serve.admission import bank as module
from serve.admission.bank import Bank, BankLedger
from serve.admission.gcra import Gcra
from serve.config import Ledger
from serve.grants import Draw, Grant, Limit, Line, Return


NOVEMBER = "2026-11"


def limit(name="a", kind="rate", burst=10, interval_s=1.0) -> Limit:
    return Limit("t/ann", name, kind, "tokens", burst, interval_s if kind == "rate" else 0)


class Books:
    """A bank, asked one line at a time."""

    def __init__(self, keys_max: int = 100, lease_s: float = 60) -> None:
        self.bank = Bank(keys_max=keys_max, lease_s=lease_s)

    def draw(self, one: Limit, need: float, now: float, replica="a", **line) -> Grant:
        draw = Draw((Line(one, need, line.get("want", need), line.get("hint")),))
        (grant,) = self.bank.exchange(replica, (), [draw], now=now, month=NOVEMBER)
        return grant

    def give(self, one: Limit, units: float, now: float, mark=0.0, replica="a") -> None:
        self.bank.exchange(replica, [Return(one, units, mark)], (), now=now, month=NOVEMBER)

    def free(self, one: Limit, now: float) -> float | None:
        return self.bank.free(one, now=now, month=NOVEMBER)


def test_only_the_longest_unused_are_forgotten():
    books = Books(keys_max=3)
    for name in "abc":
        books.draw(limit(name), 10, 0)
    books.draw(limit("a"), 1, 1)
    books.draw(limit("d"), 10, 1)
    assert [books.free(limit(name), 1) for name in "abcd"] == [0, None, 1, 0]
    for number in range(100):
        books.draw(limit(f"n{number}"), 1, 1)
    assert len(books.bank._states) == len(books.bank._young) == 3


def test_a_hint_of_a_replica_counts_once_and_only_of_new_books():
    books = Books(lease_s=60)
    books.draw(limit(interval_s=1000), 1, 0)
    books.draw(limit(interval_s=1000), 0, 10, hint=0)
    assert books.free(limit(interval_s=1000), 10) == pytest.approx(9, abs=0.1)
    books.draw(limit(interval_s=1000), 0, 61, replica="late", hint=0)
    assert books.free(limit(interval_s=1000), 61) == pytest.approx(9, abs=0.1)
    assert books.bank._young is None
    books.draw(limit("new", interval_s=1000), 0, 62, hint=4)  # nothing else is known of it
    assert books.free(limit("new", interval_s=1000), 62) == pytest.approx(4)


def test_what_others_may_hold_of_a_level_is_taken_for_held_until_they_say_so():
    books, one = Books(), limit(kind="level")
    assert books.draw(one, 1, 0, hint=3).free == (2,)  # others hold seven, it is said
    books.give(one, 5, 0.1, replica="b")
    assert books.free(one, 0.1) == 2  # five of the seven were b's
    assert books.free(one, 0.9) == 2
    assert books.free(one, 1.0) == 4  # nobody else has come


def test_units_that_came_back_to_a_level_do_not_count_against_a_hint():
    books, one = Books(), limit(kind="level")
    for now in range(20):
        books.draw(one, 1, now / 10)
        books.give(one, 0, now / 10)
    books.draw(one, 0, 2, replica="b", hint=10)
    assert books.free(one, 2) == 10


def test_a_free_line_is_never_refused():
    books, one = Books(), limit()
    books.give(one, -50, 0)
    grant = books.draw(one, 0, 0, want=5)
    assert (grant.refused, grant.units, grant.free) == (None, (0,), (-40,))


def test_a_limit_that_shrinks_or_slows_down_goes_on_with_the_units_used():
    gcra = Gcra(1.0, 0, 0)
    mark = gcra.charge(6, 0)
    gcra.change(2.0, 2)  # four are still used
    assert gcra.free(5, 2) == 1
    assert gcra.free(5, 4) == 2
    gcra.give_back(4, mark)
    assert gcra.free(5, 4) == 2  # a mark of the old rate is worth nothing
    mark = gcra.charge(1, 4)
    gcra.give_back(1, mark)
    assert gcra.free(5, 4) == 2


async def test_an_operation_is_known_for_a_lease_and_its_answers_are_bounded(clock, monkeypatch):
    monkeypatch.setattr(module, "REPLIES_MAX", 3)
    ledger = BankLedger(Ledger(lease_s=10), keys_max=10, clock=clock, wall=lambda: 0.0)
    draws = [Draw((Line(limit(interval_s=1e6), 1, 1),))]
    first = await ledger.exchange("op", "a", (), draws)
    clock.advance(10)
    assert await ledger.exchange("op", "a", (), draws) == first
    clock.advance(0.1)
    again = await ledger.exchange("op", "a", (), draws)
    assert again[0].free[0] == pytest.approx(8, abs=0.01)
    for number in range(9):
        await ledger.exchange(f"op{number}", "a", (), ())
    assert len(ledger._replies) == 3

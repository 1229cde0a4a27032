"""Whose lane is next. What it guarantees is in tests/property/test_buffer_fairness.py."""

from serve.index.lanes import Lane
from serve.index.turns import Turns
from serve.pressure import Sender


def lane(ns: str, tenant: str = "", weight: float = 1.0) -> Lane:
    return Lane(ns, Sender(tenant or ns, weight), 1.0)


def served(turns: Turns, size_bytes: int = 10, count: int = 100) -> str:
    out = ""
    while len(out) < count and (first := turns.first()) is not None:
        turns.take(first, size_bytes)
        out += first.ns
    return out


def test_lanes_of_one_tenant_go_in_the_order_in_which_they_came():
    turns = Turns()
    for ns in "bca":
        turns.add(lane(ns, "me"))
    assert served(turns) == "bca"
    assert turns.first() is None


def test_tenants_take_turns_however_many_lanes_they_have():
    turns = Turns()
    for ns in "abcdef":
        turns.add(lane(ns, "many"))
    for ns in "xy":
        turns.add(lane(ns, "few"))
    assert served(turns) == "axbycdef"


def test_bytes_count_not_flushes():
    turns = Turns()
    for ns in "abc":
        turns.add(lane(ns, "large"))
    for ns in "uvwxyz":
        turns.add(lane(ns, "small"))
    order = ""
    while (first := turns.first()) is not None:
        turns.take(first, 30 if first.tenant == "large" else 10)
        order += first.ns
    assert order == "auvwbxyzc"


def test_a_weight_divides_the_bytes():
    turns = Turns()
    for ns in "abcd":
        turns.add(lane(ns, "plain"))
    for ns in "uvwxyz":
        turns.add(lane(ns, "paid", 3.0))
    assert served(turns, count=8) == "auvwbxyz"


def test_a_new_weight_holds_for_what_a_tenant_is_ahead_by():
    turns = Turns()
    first, second, other = lane("a", "me"), lane("b", "me"), lane("x", "other")
    for one in (first, other, second):
        turns.add(one)
    turns.take(first, 100)  # 100 ahead
    first.weight = 10.0
    turns.add(first)  # now 10
    assert turns.first() is other
    turns.take(other, 11)
    turns.add(other)
    assert turns.first() is second


def test_who_rested_earns_no_credit_and_who_is_ahead_keeps_his_debt():
    turns = Turns()
    debtor, busy = lane("d"), [lane("a", "busy"), lane("b", "busy")]
    for one in (debtor, *busy):
        turns.add(one)
    turns.take(debtor, 1000)
    for _ in range(6):
        first = turns.first()
        turns.take(first, 10)
        turns.add(first)
    for one in (debtor, lane("x"), lane("y")):
        turns.add(one)
    # Those that begin to wait are as far as who went last, whatever was served before.
    assert served(turns) == "xyabd"


def test_a_lane_that_leaves_costs_nothing_and_is_not_told():
    turns = Turns()
    one, two = lane("a", "me"), lane("b", "me")
    turns.add(one)
    turns.add(two)
    turns.cancel(one)
    turns.cancel(one)
    assert not turns.holds(one)
    assert turns.holds(two)
    assert served(turns) == "b"
    turns.cancel(two)
    assert turns.lanes == 0


def test_its_memory_is_bounded_by_what_waits():
    turns = Turns()
    turns.add(lane("waits"))
    for number in range(3000):
        one = lane(f"n{number}")
        turns.add(one)
        turns.cancel(one)
    assert len(turns._heap) < 1000
    busy = [lane("a"), lane("b")]
    for one in busy:
        turns.add(one)
    for number in range(3000):
        turns.add(lane(f"m{number}"))
        for _ in range(3):
            first = turns.first()
            turns.take(first, 1)
            if first in busy:
                turns.add(first)
    assert len(turns._tenants) < 1000
    assert len(turns._heap) < 1000

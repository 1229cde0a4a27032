"""What work on documents and on lines shares: who pays, groups, and that troubles stay where they are."""

import asyncio
import random
from functools import partial

import numpy as np
import pytest

from serve.allowance import Quota, Tier
from serve.config import Ingress
from serve.errors import BadInput, ModelUnavailable, PoisonInput, QuotaExceeded
from serve.flows.bulk import Part, by_job, in_groups, one_by_one, paid, payer, rows_of
from serve.grants import Limit
from serve.items import Item, Settlement
from serve.jobs.faults import HOPELESS_S, Retries, settled
from serve.records import Caller, EmbedReply, Key


RETRIES = Retries(60, 2, 600, random.Random(1))  # noqa: S311 - not a secret
FAILED = partial(settled, retries=RETRIES)
TIERS = {"free": Tier(weight=1, bulk=Quota(tokens_per_minute=600))}


def item(number, job="job"):
    return Item(number, 1, job, number, f"d{number}", "document", "embed", 1.0, 0, {})


def part(number, *sizes):
    return Part(item(number), [np.zeros(size, np.int32) for size in sizes])


def done(one):
    return Settlement(one.id, one.lease, "done")


def words(settlements):
    return {one.item: one.word for one in settlements}


class Counter:
    """How many are inside at once, at most."""

    def __init__(self):
        self.now = self.most = 0

    async def __aenter__(self):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0)

    async def __aexit__(self, *_):
        await asyncio.sleep(0)
        self.now -= 1


# --- who pays --------------------------------------------------------------------------------


def key(tier="free", **limits):
    return Key("k", "acme", tier, "", 0.0, family="k", tenant_limits=limits)


def test_who_pays_has_the_limits_of_its_tier_and_tenant():
    caller = payer(key(bulk={"tokens_burst": 50}), TIERS)
    assert (caller.tenant, caller.weight) == ("acme", 1)
    assert [limit.burst for limit in caller.limits["bulk"]] == [50]


@pytest.mark.parametrize(
    "broken",
    [key("gone"), key(""), key(bulk={"tokens_burst": "many"}), key(nonsense=1)],
    ids=["no tier", "no tenant", "wrong limit", "wrong shape"],
)
def test_a_mistake_of_the_operator_costs_an_item_time_and_no_try(broken):
    with pytest.raises(QuotaExceeded) as raised:
        payer(broken, TIERS)
    settlement = settled(item(1), raised.value, RETRIES)
    assert settlement.word == "release"
    assert settlement.delay_s >= 0.8 * HOPELESS_S


# --- side by side ----------------------------------------------------------------------------


async def test_a_job_s_unexpected_error_leaves_the_others_time_to_end():
    ended = []

    async def act(items):
        if items[0].job == "a":
            raise KeyError("a fault of ours")
        for _ in range(10):
            await asyncio.sleep(0)
        ended.append(items[0].job)
        return [done(one) for one in items]

    items = [item(1, "a"), item(2, "b"), item(3, "a"), item(4, "c")]
    settlements = await by_job(items, act, FAILED)
    assert words(settlements) == {1: "retry", 2: "done", 3: "retry", 4: "done"}
    assert sorted(ended) == ["b", "c"]
    assert {one.fault.code for one in settlements if one.fault} == {"internal_error"}


async def test_no_items_are_no_work():
    assert await by_job([], None, FAILED) == []


async def test_items_of_one_claim_are_worked_on_a_few_at_once_and_fail_by_themselves():
    counter = Counter()

    async def act(one):
        async with counter:
            if one.id == 2:
                raise BadInput("No.")
            if one.id == 3:
                raise ZeroDivisionError
            return done(one)

    some = [item(number) for number in range(1, 6)]
    settlements = await one_by_one(some, act, FAILED, at_once=2)
    assert words(settlements) == {1: "done", 2: "dead", 3: "retry", 4: "done", 5: "done"}
    assert counter.most == 2


# --- groups ----------------------------------------------------------------------------------


def caller(*bursts, kind="rate"):
    limits = tuple(Limit("t/acme", f"l{n}", kind, "tokens", n, 1.0) for n in bursts)
    requests = Limit("t/acme", "requests", "rate", "requests", 1, 1.0)
    return Caller("acme", "free", 1.0, "k", limits={"bulk": (requests, *limits)})


async def grouped(parts, who, **ingress):
    """Which items went together, and how many such groups at once."""
    counter, groups = Counter(), []

    async def act(group):
        groups.append([one.item.id for one in group])
        async with counter:
            return [done(one.item) for one in group]

    settlements = await in_groups(
        parts, act, FAILED, caller=who, klass="bulk", ingress=Ingress(**ingress)
    )
    assert sorted(words(settlements)) == [one.item.id for one in parts]
    return groups, counter.most


async def test_a_group_is_one_call_of_the_embedder_and_a_larger_part_goes_alone():
    parts = [part(1, 100, 50), part(2, 100), part(3, 7), part(4, 900), part(5, 256)]
    for who in (caller(), Caller("acme", "free", 1.0, "k"), caller(10_000)):
        made = await grouped(parts, who, slice_tokens=256, slices_in_flight_max=3)
        assert made == ([[1, 2], [3], [4], [5]], 3)


@pytest.mark.parametrize("kind", ["rate", "level", "month"])
async def test_groups_together_are_never_more_than_a_limit_of_the_payer_holds(kind):
    parts = [part(number, 100) for number in range(1, 7)]
    assert await grouped(parts, caller(256, 10_000, kind=kind)) == ([[1, 2], [3, 4], [5, 6]], 1)
    sliced = partial(grouped, slice_tokens=256, slices_in_flight_max=3)
    assert await sliced(parts, caller(600, kind=kind)) == ([[1, 2], [3, 4], [5, 6]], 2)


async def test_a_group_s_error_is_that_group_s():
    async def act(group):
        if group[0].item.id == 1:
            raise ModelUnavailable("Gone.")
        if group[0].item.id == 3:
            raise KeyError("a fault of ours")
        return [done(one.item) for one in group]

    parts = [part(number, 100) for number in range(1, 7)]
    ingress = Ingress(slice_tokens=256)
    settlements = await in_groups(
        parts, act, FAILED, caller=caller(), klass="bulk", ingress=ingress
    )
    assert words(settlements) == {
        **dict.fromkeys((1, 2, 3, 4), "retry"),
        **dict.fromkeys((5, 6), "done"),
    }
    codes = {one.item: one.fault.code for one in settlements if one.fault}
    assert codes == {
        **dict.fromkeys((1, 2), "model_unavailable"),
        **dict.fromkeys((3, 4), "internal_error"),
    }


def test_each_part_gets_its_own_rows_and_failures_in_order():
    group = [part(1, 3, 4), part(2, 5), part(3, 6, 7)]
    late, first, other = (PoisonInput(word) for word in ("late", "first", "other"))
    reply = EmbedReply(np.arange(5.0)[:, None], ((4, late), (1, other), (3, first)))
    found = [
        (one.item.id, rows.ravel().tolist(), faults) for one, rows, faults in rows_of(group, reply)
    ]
    assert found == [
        (1, [0, 1], [(1, other)]),
        (2, [2], []),
        (3, [3, 4], [(0, first), (1, late)]),
    ]


def test_what_failed_by_our_fault_is_not_paid():
    group = [part(1, 3, 4), part(2, 5), part(3, 6), part(4, 8)]
    fates = {1: ModelUnavailable("ours"), 2: PoisonInput("theirs"), 3: None, 4: "a vector"}
    assert paid(group, fates) == 5 + 6 + 8
    assert paid(group, {}) == 26

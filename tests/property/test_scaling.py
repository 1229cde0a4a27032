"""Autoscaling: what must hold whatever there is to do, and whatever is known of it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from serve.config import IngressScaling, PoolScaling, WorkerScaling
from serve.flows.scaling import (
    Load,
    Memory,
    Replica,
    Standing,
    decide,
    ingress_load,
    pool_load,
    worker_load,
)
from serve.items import Stage
from serve.scaling import Backlog


AMOUNTS = st.floats(0, 1e9)
MEMORIES = st.builds(
    Memory,
    over_since=st.none() | st.floats(0, 1000),
    under_since=st.none() | st.floats(0, 1000),
    peak=st.integers(0, 50),
)
NOW = 1000.0


@st.composite
def rules(draw):
    low = draw(st.integers(0, 20))
    return PoolScaling(
        min=low,
        max=draw(st.integers(max(low, 1), 40)),
        drain_s=draw(st.floats(0.1, 1000)),
        up_s=draw(st.floats(0, 60)),
        down_s=draw(st.floats(0, 600)),
        idle_s=draw(st.floats(0, 600)),
    )


KNOWN = st.just(())


@st.composite
def loads(draw, unknown=KNOWN):
    return Load(
        Standing(draw(st.integers(0, 50)), draw(st.integers(0, 50))),
        work=draw(AMOUNTS),
        capacity=draw(st.none() | st.floats(0.1, 1e7)),
        said="",
        inputs={},
        busy=draw(st.floats(0, 50)),
        unknown=draw(unknown),
    )


ANY = st.sampled_from([(), ("nothing is known",)])


@given(rule=rules(), load=loads(ANY), memory=MEMORIES)
def test_bounds_hold_whatever_comes(rule, load, memory):
    step, _ = decide(rule, load, memory, NOW)
    assert rule.min <= step.wanted <= rule.max


@given(rule=rules(), load=loads(ANY), memory=MEMORIES, more=AMOUNTS)
def test_more_work_never_takes_fewer(rule, load, memory, more):
    less, _ = decide(rule, load, memory, NOW)
    greater, _ = decide(rule, replace(load, work=load.work + more), memory, NOW)
    assert greater.wanted >= less.wanted


@given(rule=rules(), load=loads(st.just(("the backlog is unknown",))), memory=MEMORIES)
def test_what_is_unknown_lets_none_leave(rule, load, memory):
    held = min(max(load.standing.target, rule.min), rule.max)
    step, after = decide(rule, load, memory, NOW)
    assert step.wanted >= held
    silent, _ = decide(rule, replace(load, work=0.0), memory, NOW)
    assert silent.wanted == held
    assert after.under_since is None  # the time before something was unknown does not count


@given(rule=rules(), load=loads(ANY), seconds=st.lists(st.floats(0.1, 100), max_size=60))
def test_a_constant_load_never_turns_it_round(rule, load, seconds):
    memory, now = Memory(), 0.0
    target = min(max(load.standing.target, rule.min), rule.max)
    path = [target]
    for passed in seconds:
        now += passed
        load = replace(load, standing=Standing(path[-1], path[-1]))
        step, memory = decide(rule, load, memory, now)
        path.append(step.wanted)
    assert path in (sorted(path), sorted(path, reverse=True))


@given(needs=st.lists(st.integers(1, 8), min_size=1, max_size=20), more=st.integers(1, 5))
def test_as_many_stay_as_were_needed_at_most(needs, more):
    rule, target = PoolScaling(max=20, down_s=len(needs)), max(needs) + more
    memory = Memory()
    for now, need in enumerate([*needs, 1]):
        load = Load(Standing(target, target), need * 10.0, 10.0, "", {})
        assert target == max(needs) + more  # none has left before its time
        step, memory = decide(rule, load, memory, float(now))
        target = step.wanted
    assert target == max(needs)


@given(replicas=st.integers(2, 9), down_s=st.floats(1, 600), turns=st.integers(1, 20))
def test_a_wave_that_is_shorter_than_the_pause_takes_none_away(replicas, down_s, turns):
    rule = PoolScaling(min=0, max=10, down_s=down_s, idle_s=down_s)
    high = Load(Standing(replicas, replicas), replicas * 10.0, 10.0, "", {})
    memory, now = Memory(), 0.0
    for turn in range(2 * turns):
        now += 0.9 * down_s
        step, memory = decide(rule, high if turn % 2 else replace(high, work=0.0), memory, now)
        assert step.wanted == replicas


@given(
    rule=rules(),
    load=loads(ANY),
    memory=MEMORIES,
    work=st.floats(1e-3, 1e9),
)
def test_one_that_sleeps_wakes_at_once_for_anything(rule, load, memory, work):
    rule = rule.model_copy(update={"min": 0})
    asleep = replace(load, standing=Standing(0, 0), work=work)
    assert decide(rule, asleep, memory, NOW)[0].wanted >= 1


LONG_UNDER = Memory(under_since=-1e9)


@given(rule=rules(), load=loads())
def test_none_leaves_while_those_that_stay_would_have_too_much_to_do(rule, load):
    target = min(max(load.standing.target, rule.min), rule.max)
    step, _ = decide(rule, replace(load, work=0.0), LONG_UNDER, NOW)
    assert step.wanted >= min(target, load.busy / 0.8)


@given(rule=rules(), target=st.integers(0, 50))
def test_idle_ones_leave_but_never_from_several_to_none(rule, target):
    load = Load(Standing(target, target), work=0.0, capacity=10.0, said="", inputs={})
    step, _ = decide(rule, load, LONG_UNDER, NOW)
    several = min(target, rule.max) > 1
    assert step.wanted == max(rule.min, 1 if several else 0)


@given(rule=rules(), load=loads(ANY), memory=MEMORIES)
def test_the_reason_says_what_is_done(rule, load, memory):
    target = min(max(load.standing.target, rule.min), rule.max)
    step, _ = decide(rule, load, memory, NOW)
    word = step.reason.split()[0]
    assert (word in {"Rises", "Wakes"}) == (step.wanted > target)
    assert (word == "Falls") == (step.wanted < target)


REPLICAS = st.lists(
    st.builds(
        Replica,
        queued=AMOUNTS,
        tokens_per_s=st.floats(1, 1e6),
        busy=st.floats(0, 1),
        age_s=st.floats(0, 30),
    ),
    max_size=8,
)


@given(rule=rules(), replicas=REPLICAS, tokens=AMOUNTS, memory=MEMORIES, target=st.integers(0, 50))
def test_what_the_index_cannot_take_raises_nothing(rule, replicas, tokens, memory, target):
    """The Store may hold anything then: the decision is that of an empty one."""

    def decided(stored):
        backlog = Backlog({"m": stored}, {}, index_full=True)
        standing = Standing(target, len(replicas))
        load = pool_load(rule, standing, replicas, backlog, models=["m"], pace=None)
        return decide(rule, load, memory, NOW)[0].wanted

    assert decided(tokens) == decided(0.0)
    if not sum(one.queued for one in replicas):
        assert decided(tokens) <= max(min(max(target, rule.min), rule.max), 0)


@given(rule=rules(), replicas=REPLICAS, tokens=AMOUNTS, age_s=st.floats(0, 30))
def test_a_pool_knows_all_or_says_what_it_does_not(rule, replicas, tokens, age_s):
    backlog = Backlog({"m": tokens, "other": 5e9}, {}, age_s=age_s)
    standing = Standing(1, len(replicas))
    load = pool_load(rule, standing, replicas, backlog, models=["m"], pace=None)
    stale = [one for one in (*replicas, backlog) if one.age_s > rule.stale_s]
    assert bool(load.unknown) == bool(stale)
    fresh = sum(one.queued for one in replicas if one.age_s <= rule.stale_s)
    assert load.work == fresh + (tokens if age_s <= rule.stale_s else 0.0)


@given(items=st.integers(0, 10**6), embeds=st.integers(0, 10**6), each=st.integers(1, 20_000))
def test_workers_are_there_for_their_stages(items, embeds, each):
    rule = WorkerScaling(max=1000, items_per_replica=each)
    backlog = Backlog({}, {"prepare": items, "embed": embeds})
    load = worker_load(rule, Standing(1, 1), ("prepare",), backlog)
    assert (load.work, load.unknown) == (items, ())
    both: tuple[Stage, ...] = ("prepare", "embed")
    assert worker_load(rule, Standing(1, 1), both, backlog).work == items + embeds
    full = replace(backlog, index_full=True)
    assert worker_load(rule, Standing(1, 1), both, full).work == items
    assert worker_load(rule, Standing(1, 1), both, None).unknown


@given(requests=st.floats(0, 1e6))
def test_the_door_opens_wider_for_more_requests(requests):
    rule = IngressScaling(max=1000, requests_per_replica=10)
    load = ingress_load(rule, Standing(1, 1), requests)
    step, _ = decide(rule, load, Memory(over_since=0.0), NOW)
    assert step.wanted == min(max(-(-requests // 10), 1), 1000)

"""How many replicas a deployment should have: values and `now` in, values out.

`pool_load`, `worker_load` and `ingress_load` say what there is to do and what one replica does of it;
`decide` makes replicas of that, with bounds, hysteresis and doubt (docs/adr/0031).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from serve.config import Autoscaling, IngressScaling, Pool, PoolScaling, WorkerScaling
from serve.flows.room import LANDING
from serve.items import Stage
from serve.scaling import Backlog


BUSY_MAX = 0.8
"""Replicas leave only while those that stay would be busy for less of the time: else a pool that keeps up
would shrink, fall behind and grow again."""


@dataclass(frozen=True, slots=True)
class Replica:
    """What an embedder replica told of itself, `age_s` ago.

    `queued` is in tokens; `busy` is the part of the last seconds that its model worked, 0..1.
    """

    queued: float
    tokens_per_s: float
    busy: float
    age_s: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Replicas that are wanted so far, and that run."""

    target: int
    running: int


@dataclass(frozen=True, slots=True)
class Load:
    """What a deployment has to do, as far as it is known.

    Attributes:
        work: in tokens, items or requests.
        capacity: how much of it one replica is there for; None: not measured yet.
        busy: replicas' worth of work that is being done.
        unknown: what is not known, in words: what it adds may be anything.
        said: what is known, in words.
        inputs: the figures, by name.
    """

    standing: Standing
    work: float
    capacity: float | None
    said: str
    inputs: Mapping[str, float | None]
    busy: float = 0.0
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Since when more or fewer have been needed, and how many of those at most."""

    over_since: float | None = None
    under_since: float | None = None
    peak: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """How many replicas, and why, in a sentence."""

    wanted: int
    reason: str


def decide(rule: Autoscaling, load: Load, memory: Memory, now: float) -> tuple[Step, Memory]:
    """Replicas for a load, within the rule's bounds.

    More come once they have been needed for `up_s`, the first of a deployment that sleeps at once. Fewer
    once they have done for `down_s`, as many as were needed at most meanwhile; from one to none after
    `idle_s`. What is unknown lets none leave; what is known may still ask for more.
    """
    target = _within(rule, load.standing.target)
    needed = _within(rule, _needed(load))
    if needed > target:
        return _raise(rule, load, memory, target=target, needed=needed, now=now)
    if load.unknown:
        return Step(target, f"Holds {target}: {' and '.join(load.unknown)}. {load.said}"), Memory()
    working = min(target, math.ceil(load.busy / BUSY_MAX))
    lower = max(needed, working, int(target > 1))  # never from several to none
    if lower == target:
        return Step(target, f"Stays at {target}. {load.said}"), Memory()
    return _lower(rule, load, memory, target=target, lower=lower, now=now)


def _raise(
    rule: Autoscaling, load: Load, memory: Memory, *, target: int, needed: int, now: float
) -> tuple[Step, Memory]:
    since = now if memory.over_since is None else memory.over_since
    left_s = since + rule.up_s - now
    if target == 0 or left_s <= 0:
        word = "Wakes" if target == 0 else "Rises"
        return Step(needed, f"{word} from {target} to {needed}. {load.said}"), Memory()
    reason = f"Stays at {target}; rises to {needed} if that is needed for another {left_s:.0f} s. "
    return Step(target, reason + load.said), Memory(over_since=since)


def _lower(
    rule: Autoscaling, load: Load, memory: Memory, *, target: int, lower: int, now: float
) -> tuple[Step, Memory]:
    if memory.peak >= target:  # it is of a time when more were wanted
        memory = Memory()
    since = now if memory.under_since is None else memory.under_since
    peak = max(memory.peak, lower)
    wait_s = rule.idle_s if isinstance(rule, PoolScaling) and peak == 0 else rule.down_s
    left_s = since + wait_s - now
    if left_s <= 0:
        return Step(peak, f"Falls from {target} to {peak}. {load.said}"), Memory()
    reason = f"Stays at {target}; falls to {peak} if that does for another {left_s:.0f} s. "
    return Step(target, reason + load.said), Memory(under_since=since, peak=peak)


def _needed(load: Load) -> int:
    if load.work <= 0:
        return 0
    return 1 if load.capacity is None else max(math.ceil(load.work / load.capacity), 1)


def _within(rule: Autoscaling, replicas: int) -> int:
    return min(max(replicas, rule.min), rule.max)


def pool_load(
    rule: PoolScaling,
    standing: Standing,
    replicas: Sequence[Replica],
    backlog: Backlog | None,
    *,
    models: Iterable[str],
    pace: float | None,
) -> Load:
    """Tokens that wait in a pool's replicas, and for its `models` in the Store.

    `pace` is the tokens/s of a replica as it was last measured, for while none tells it. While the index
    has no room what waits in the Store is not counted: more GPUs would not land it.
    """
    fresh = [one for one in replicas if one.age_s <= rule.stale_s]
    queued = sum(one.queued for one in fresh)
    told = [one.tokens_per_s for one in fresh if one.tokens_per_s > 0]
    pace = sum(told) / len(told) if told else pace
    stored = None
    if backlog is not None and backlog.age_s <= rule.stale_s:
        stored = sum(backlog.tokens.get(model, 0.0) for model in models)
    full = backlog is not None and backlog.index_full
    unknown = []
    if len(fresh) < standing.running:
        unknown.append(f"{standing.running - len(fresh)} replicas tell nothing of their queues")
    if stored is None:
        unknown.append("the Store's backlog is unknown")
    return Load(
        standing,
        work=queued + (0.0 if full or stored is None else stored),
        capacity=None if pace is None else pace * rule.drain_s,
        busy=sum(one.busy for one in fresh),
        unknown=tuple(unknown),
        said=_pool_words(queued, stored, pace, drain_s=rule.drain_s, full=full),
        inputs={
            "queued_tokens": queued,
            "backlog_tokens": stored,
            "tokens_per_s": pace,
            "busy_replicas": sum(one.busy for one in fresh),
            "index_full": float(full),
            "replicas_age_s": max((one.age_s for one in replicas), default=None),
            "backlog_age_s": None if backlog is None else backlog.age_s,
        },
    )


def _pool_words(
    queued: float, stored: float | None, pace: float | None, *, drain_s: float, full: bool
) -> str:
    waits = f"{queued:,.0f} tokens wait in replicas"
    if stored is not None:
        waits += f" and {stored:,.0f} in the Store"
        waits += ", which do not count while the index has no room" if full else ""
    if pace is None:
        return f"{waits}; how fast a replica is has not been measured."
    return f"{waits}; a replica does {pace:,.0f} a second, and {drain_s:g} s are aimed at."


def worker_load(
    rule: WorkerScaling, standing: Standing, stages: Sequence[Stage], backlog: Backlog | None
) -> Load:
    """Items of a worker's stages; those that land are not counted while the index has no room."""
    known = backlog is not None and backlog.age_s <= rule.stale_s
    full = backlog is not None and backlog.index_full
    counted = [stage for stage in stages if not (full and stage == LANDING)]
    items = sum(backlog.items.get(stage, 0) for stage in counted) if backlog and known else 0
    said = (
        f"{items:,} items of {' and '.join(counted) or 'no stage'} are ready or in work"
        f"{', none that lands is counted while the index has no room' if full else ''}; "
        f"there is a replica for every {rule.items_per_replica:,}."
    )
    return Load(
        standing,
        work=items,
        capacity=rule.items_per_replica,
        unknown=() if known else ("the Store's backlog is unknown",),
        said=said,
        inputs={
            "items": items if known else None,
            "index_full": float(full),
            "backlog_age_s": None if backlog is None else backlog.age_s,
        },
    )


def ingress_load(rule: IngressScaling, standing: Standing, requests: float) -> Load:
    """Requests that are being answered, as Serve counts them."""
    each = rule.requests_per_replica
    said = f"{requests:,.0f} requests are open; there is a replica for every {each:g}."
    return Load(standing, requests, each, said, {"requests": requests})


def models_of(pools: Sequence[Pool], name: str) -> tuple[str, ...]:
    """Models whose backlog is that of the pool; jobs that name none go to the first that embeds."""
    first = next(
        pool.name for pool in pools if any(model.kind == "embedding" for model in pool.models)
    )
    (own,) = (pool for pool in pools if pool.name == name)
    return (*(model.id for model in own.models), *(("",) if name == first else ()))

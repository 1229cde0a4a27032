"""How long writes take from accepted to indexed and to searchable, as the one writer sees it.

Accepted is when the Store committed the write, by its clock; the rest is by the wall clock of this
process. So two machines differ by what their clocks do, which is milliseconds where they are kept in step.
One landing is one offer: what a worker hands over together, of one job.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from serve.freshness import Lag, Spread, latest
from serve.index.probes import Probes
from serve.index.writer import Writer
from serve.ports import Upserter
from serve.pressure import Pressure, Sender
from serve.records import CollectionSpec, Outcome, Write


LANDINGS = 200
"""The last of each namespace are remembered: enough for a 95th percentile."""

NAMESPACES_MAX = 1000
"""Namespaces remembered, about 8 MB; the one that was written to longest ago is forgotten."""

UNTOLD_MAX = 20_000
"""Times that wait for whoever counts them, 10 s of 1,000 landings a second."""

Reached = Literal["indexed", "searchable"]


@dataclass(slots=True)
class _Past:
    """Of one namespace, in seconds."""

    indexed: deque[float] = field(default_factory=lambda: deque(maxlen=LANDINGS))
    searchable: deque[float] = field(default_factory=lambda: deque(maxlen=LANDINGS))


class Lags:
    """The last times of each namespace, and those that nobody has counted yet."""

    def __init__(self, probes: Probes, wall: Callable[[], float]) -> None:
        """`wall` gives epoch seconds."""
        self._probes = probes
        self._wall = wall
        self._past: OrderedDict[str, _Past] = OrderedDict()
        self._untold: deque[tuple[Reached, float]] = deque(maxlen=UNTOLD_MAX)

    def landed(self, ns: str, writes: Sequence[Write], outcomes: Sequence[Outcome]) -> None:
        """These writes have come to an end; those of which it is not known when they were accepted, and
        those that did not land, are left out.
        """
        pairs = zip(writes, outcomes, strict=True)
        landed = [(one.accepted_at, end.token) for one, end in pairs if end.word == "landed"]
        since = min((accepted for accepted, _ in landed if accepted), default=None)
        if since is None:
            return
        self._note(ns, "indexed", since)
        token = latest(token for _, token in landed)

        def told(seen: bool) -> None:  # noqa: FBT001  a `probes.Told`
            if seen:
                self._note(ns, "searchable", since)

        if token is None:
            told(True)  # noqa: FBT003
        else:
            self._probes.expect(ns, token, told)

    def of(self, namespaces: Iterable[str]) -> Lag:
        """The last landings of these namespaces, all together."""
        found = [past for ns in namespaces if (past := self._past.get(ns)) is not None]
        indexed = [each for past in found for each in past.indexed]
        searchable = [each for past in found for each in past.searchable]
        return Lag(len(indexed), _spread(indexed), _spread(searchable))

    def take(self) -> list[tuple[Reached, float]]:
        """What came since the last call, to be counted."""
        untold = list(self._untold)
        self._untold.clear()
        return untold

    def forget(self, ns: str) -> None:
        """A namespace is gone."""
        self._past.pop(ns, None)

    def _note(self, ns: str, reached: Reached, since: float) -> None:
        took_s = max(0.0, self._wall() - since)
        past = self._past.setdefault(ns, _Past())
        self._past.move_to_end(ns)
        if len(self._past) > NAMESPACES_MAX:
            self._past.popitem(last=False)
        (past.indexed if reached == "indexed" else past.searchable).append(took_s)
        self._untold.append((reached, took_s))


class TimedWriter(Upserter):
    """The writer, with the lag of what it lands."""

    def __init__(self, writer: Writer, lags: Lags) -> None:
        self._writer = writer
        self._lags = lags

    async def offer(
        self, sender: Sender, ns: str, writes: Sequence[Write], deadline_s: float
    ) -> tuple[Outcome, ...]:
        """See `Writer.offer`."""
        outcomes = await self._writer.offer(sender, ns, writes, deadline_s)
        self._lags.landed(ns, writes, outcomes)
        return outcomes

    async def pressure(self) -> Pressure:
        """See `Writer.pressure`."""
        return await self._writer.pressure()

    async def ensure(self, spec: CollectionSpec) -> None:
        """See `Writer.ensure`."""
        await self._writer.ensure(spec)

    async def drop(self, ns: str) -> None:
        """See `Writer.drop`."""
        await self._writer.drop(ns)
        self._lags.forget(ns)

    async def lag(self, namespaces: Sequence[str]) -> Lag:
        """See Upserter."""
        return self._lags.of(namespaces)


def _spread(times: Sequence[float]) -> Spread | None:
    """By nearest rank."""
    ranked = sorted(times)
    if not ranked:
        return None
    return Spread(ranked[ceil(0.5 * len(ranked)) - 1], ranked[ceil(0.95 * len(ranked)) - 1])

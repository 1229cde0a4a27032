"""What happens to jobs, as one ingress replica hears of it: one long poll of the Store for everybody
here who waits.

Nothing is promised to be heard: who missed something (it came too fast, or happened before they
listened) finds it in the Store, so a listener needs no more memory than its bound.
"""

import asyncio
import logging
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from serve.errors import ServiceError
from serve.items import JOB_ENDS, Event
from serve.job_ports import Events


POLL_WAIT_S = 20.0
"""How long a poll waits in the Store: a replica asks at least so often."""

POLL_EVENTS = 1000
"""Events of one poll, about 300 KB."""

PAGE = 200
"""Events of one job that are read from the Store at once."""

BUFFERED_MAX = 100
"""Events that wait for one slow reader, 50 s of progress; it reads on in the Store."""

AWAY_S = 0.5
"""Between two tries while the Store is away."""

PING_S = 15.0
"""A stream on which nothing happens says so this often: proxies cut silent connections."""

ENDS = frozenset(f"job.{state}" for state in JOB_ENDS)

log = logging.getLogger("headrace.feed")


class Listener(Protocol):
    """Is told of each event of its job."""

    def hear(self, event: Event) -> None:
        """Must not block."""
        ...


L = TypeVar("L", bound=Listener)


class Watch:
    """Waits for the end of one job."""

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    def hear(self, event: Event) -> None:
        """See Listener."""
        if event.type in ENDS:
            self._ended.set()

    async def ended(self, seconds: float) -> bool:
        """Whether the job's end was heard within so many seconds; if not, the Store knows."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), max(seconds, 0))
        return self._ended.is_set()


class Subscription:
    """A job's events for one reader. `behind`: some may have been missed, they are in the Store."""

    def __init__(self) -> None:
        self.behind = True
        self._heard: deque[Event] = deque()
        self._bell = asyncio.Event()

    def hear(self, event: Event) -> None:
        """See Listener."""
        if len(self._heard) < BUFFERED_MAX:
            self._heard.append(event)
        else:
            self.behind = True
        self._bell.set()

    def catch_up(self) -> None:
        """Forget what was heard: what the Store tells from now on has it all."""
        self.behind = False
        self._heard.clear()
        self._bell.clear()

    async def take(self, seconds: float) -> list[Event]:
        """What was heard, waiting so long for the first."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._bell.wait(), seconds)
        self._bell.clear()
        heard = list(self._heard)
        self._heard.clear()
        return heard


class Feed:
    """Events of jobs for the waiters of one ingress replica. `run` must be running."""

    def __init__(self, events: Events, clock: Callable[[], float]) -> None:
        """`clock` is the one that `wait_ended` is told a time of."""
        self._events = events
        self._clock = clock
        self._listeners: defaultdict[str, set[Listener]] = defaultdict(set)

    async def run(self) -> None:
        """Poll the Store until cancelled; while it is away, ask again and again."""
        after: int | None = None
        while True:
            try:
                if after is None:
                    after = await self._begin()
                events = await self._events.events(after, POLL_EVENTS, POLL_WAIT_S)
            except ServiceError as error:
                log.warning("cannot hear of jobs: %s", error)
                await asyncio.sleep(AWAY_S)
                continue
            for event in events:
                after = event.number
                for listener in tuple(self._listeners.get(event.job, ())):
                    listener.hear(event)

    async def _begin(self) -> int:
        """The last number, less a poll: what happened while we asked is told to who waits."""
        (last,) = await self._events.events(-1, 1, 0)
        return max(last.number - POLL_EVENTS, 0)

    @contextmanager
    def watch(self, job: str) -> Iterator[Watch]:
        """Listen for a job's end. Begin before the job is submitted, and none is missed."""
        with self._listening(job, Watch()) as watch:
            yield watch

    async def wait_ended(self, job: str, until: float) -> None:
        """Return when the job's end is heard, or at `until`; what became of it the Store knows."""
        with self.watch(job) as watch:
            await watch.ended(until - self._clock())

    async def last(self, tenant: str, job: str) -> int:
        """The number of the job's last event; 0 where there is none. Raises StoreUnavailable.

        Not that of all events: it would tell how much others do.
        """
        last = await self._events.job_events(tenant, job, -1, 1)
        return last[0].number if last else 0

    async def missed(self, tenant: str, job: str, after: int) -> bool:
        """Whether there is an event of the job above that number. Raises StoreUnavailable."""
        return bool(await self._events.job_events(tenant, job, after, 1))

    async def follow(
        self, tenant: str, job: str, after: int, *, ended: bool, until: float
    ) -> AsyncGenerator[Event | None, None]:
        """A job's events above number `after`, each once and in order.

        Ends after the job's end, or at `until` on the loop's clock; None: nothing happened for
        `PING_S`. `ended` is whether the job had ended when it was last seen. Raises
        StoreUnavailable.
        """
        loop = asyncio.get_running_loop()
        with self._listening(job, Subscription()) as heard:
            while (left_s := until - loop.time()) > 0:
                caught_up = not heard.behind
                events: Sequence[Event]
                if heard.behind:
                    heard.catch_up()
                    events = await self._events.job_events(tenant, job, after, PAGE)
                    heard.behind = heard.behind or len(events) == PAGE
                elif ended:
                    return
                else:
                    events = await heard.take(min(PING_S, left_s))
                for event in events:
                    if event.number > after:
                        after, ended = event.number, event.type in ENDS
                        yield event
                if caught_up and not events:
                    yield None

    @contextmanager
    def _listening(self, job: str, listener: L) -> Iterator[L]:
        self._listeners[job].add(listener)
        try:
            yield listener
        finally:
            self._listeners[job].discard(listener)
            if not self._listeners[job]:
                del self._listeners[job]

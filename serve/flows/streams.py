"""Replies that take long (event streams, downloads): so many at once in one ingress replica.

They are free and hold a connection, and what a slow reader does not take piles up before it: neither
one tenant nor all together may fill the replica with them.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from serve.config import Settings
from serve.errors import Overloaded, QuotaExceeded


class Streams:
    """Places of long replies: `jobs.streams_max` for a tenant, half of `ingress.requests_max` in all."""

    code = "streams"
    noun = "streams and downloads"

    def __init__(self, settings: Settings) -> None:
        self._tenant_max = settings.jobs.streams_max
        self._total_max = settings.ingress.requests_max // 2
        self._lasts_s = settings.jobs.stream_s
        self._ends: defaultdict[str, list[float]] = defaultdict(list)
        self.count = 0

    @contextmanager
    def open(self, tenant: str) -> Iterator[float]:
        """A place; yields when the reply must have ended, on the loop's clock.

        Raises QuotaExceeded (`code`: the tenant has all of its own), Overloaded (all are taken).
        """
        now = asyncio.get_running_loop().time()
        mine = self._ends.get(tenant, ())
        if len(mine) >= self._tenant_max:
            raise QuotaExceeded(
                f"You have {len(mine)} {self.noun} open; {self._tenant_max} are allowed.",
                code=self.code,
                retry_after_s=max(min(mine) - now, 1),
            )
        if self.count >= self._total_max:
            first = min(end for ends in self._ends.values() for end in ends)
            raise Overloaded(f"Too many {self.noun} are open.", retry_after_s=max(first - now, 1))
        until = now + self._lasts_s
        self._ends[tenant].append(until)
        self.count += 1
        try:
            yield until
        finally:
            self.count -= 1
            self._ends[tenant].remove(until)
            if not self._ends[tenant]:
                del self._ends[tenant]


class Exports(Streams):
    """Places of exports, which are fewer: each holds parts of a collection in memory.

    `ingress.tenant_exports_max` for a tenant, `ingress.exports_max` in all.
    """

    code = "exports"
    noun = "exports"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._tenant_max = settings.ingress.tenant_exports_max
        self._total_max = settings.ingress.exports_max

"""The Store over Postgres, as each process of the service holds it. Only those that need it import
this, since SQL takes 0.3 s of a core.
"""

import asyncio

from serve.config import Settings
from serve.jobs.owner import StoreOwner


class PostgresStore(StoreOwner):
    """The Store over Postgres, in any process. Its clock is the database's."""

    @classmethod
    def connect(cls, url: str, settings: Settings) -> "PostgresStore":
        """Blocks for the database. Raises StoreUnavailable."""
        return cls(
            url,
            settings.store,
            None,
            collections_max=settings.limits.collections_max,
            jobs=settings.jobs,
            shares=settings.admission.shares,
        )

    async def ready(self, timeout_s: float) -> bool:
        """Whether it answers."""
        async with asyncio.timeout(timeout_s):
            await self.list_tenants("", 1)
        return True

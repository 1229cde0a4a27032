"""Jobs and claims by the statements themselves, for properties that need thousands of them."""

from typing import Any

import sqlalchemy as sa

from serve.items import Claim, Job
from serve.jobs import claims, submit
from serve.records import Klass


LEASE_S = 15.0
SHARES: dict[Klass, float] = {"interactive": 0.9, "bulk": 0.1}
ROOM = submit.Room(10**6, 10**6, 1e12)


def new_job(number: int, tenant: str, **fields: Any) -> Job:
    plain: dict[str, Any] = {
        "id": f"job_{number:06d}",
        "tenant": tenant,
        "key": "key",
        "kind": "documents",
        "klass": "bulk",
        "weight": 1.0,
        "created_at": 0.0,
    }
    return Job(**{**plain, **fields})


def claim(
    conn: sa.Connection, owner: str, stage: Any, most: int, *, now: float, cost: float = 1e9
) -> Claim | None:
    wanted = claims.Wanted(most, cost)
    return claims.claim(conn, owner, stage, wanted=wanted, shares=SHARES, lease_s=LEASE_S, now=now)

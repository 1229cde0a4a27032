"""How far into the index's log landed writes reach: what must outlive a process for a receipt to say
whether searches see them. There is none of an index that shows a write as soon as it has returned.
"""

from collections.abc import Iterable, Mapping

import sqlalchemy as sa

from serve.jobs.job_tables import tokens
from serve.jobs.rows import parts


_OF = sa.select(tokens.c.token).where(tokens.c.owner == sa.bindparam("owner"))
_RAISE = (
    sa.update(tokens)
    .where(tokens.c.owner == sa.bindparam("_owner"))
    .values(
        token=sa.case(
            (tokens.c.token < sa.bindparam("_token"), sa.bindparam("_token")), else_=tokens.c.token
        )
    )
)
_NEW = sa.insert(tokens)
_FORGET = sa.delete(tokens).where(tokens.c.owner.in_(sa.bindparam("owners", expanding=True)))


def find(conn: sa.Connection, owner: str) -> int | None:
    """Of a job or a collection, by its id."""
    return conn.execute(_OF, {"owner": owner}).scalar_one_or_none()


def reach(conn: sa.Connection, reached: Mapping[str, int]) -> None:
    """What these owners have landed reaches so far, or farther already.

    In one order for all: no deadlock on Postgres.
    """
    for owner, token in sorted(reached.items()):
        if conn.execute(_RAISE, {"_owner": owner, "_token": token}).rowcount == 0:
            conn.execute(_NEW, {"owner": owner, "token": token})


def forget(conn: sa.Connection, owners: Iterable[str]) -> None:
    """These jobs or collections are gone."""
    for part in parts(list(owners)):
        conn.execute(_FORGET, {"owners": part})

"""Pages of what is listed by time, whatever of it is asked for: ids sort by time."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa


def newest(
    key: sa.Column[str], runs: Sequence[Sequence[sa.ColumnElement[bool]]], after: str, limit: int
) -> sa.Select[Any]:
    """Ids of the newest rows of several runs of an index, those that are older than the id `after`.

    A run is all rows that meet its conditions, in the order of their ids. Of each no more than
    `limit` are read, however many rows there are in it and beside it.
    """
    older = (key < after,) if after else ()
    parts = (
        sa.select(key).where(*run, *older).order_by(key.desc()).limit(limit).subquery()
        for run in runs
    )
    merged = sa.union_all(*(sa.select(part.c.id) for part in parts)).subquery()
    return sa.select(merged.c.id).order_by(merged.c.id.desc()).limit(limit)

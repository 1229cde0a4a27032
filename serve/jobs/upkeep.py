"""What the Store forgets or folds by the way, a bounded number of rows in one transaction."""

from collections.abc import Callable

import sqlalchemy as sa


class Chore:
    """Runs once in `every_s`, and on with the next transaction while there is more to do."""

    def __init__(
        self,
        work: Callable[[sa.Connection, float, int], int],
        *,
        every_s: float,
        rows_max: int,
    ) -> None:
        """`work` gets the connection, `now` and `rows_max`, and returns how many rows it did."""
        self._work = work
        self._every_s = every_s
        self._rows_max = rows_max
        self._due = 0.0

    def __call__(self, conn: sa.Connection, now: float) -> None:
        """Work if it is time."""
        if now >= self._due:
            done = self._work(conn, now, self._rows_max)
            self._due = now if done == self._rows_max else now + self._every_s

"""Vectors that were made before, in memory, bounded in bytes. No I/O, no clock."""

from collections import OrderedDict
from collections.abc import Hashable

from serve.records import Vector


ENTRY_BYTES = 400
"""What an entry takes beside its row: the key, the array's own object and the place in the table
(measured with `tracemalloc`: 334 to 392 bytes, by how full the table is).
"""


class RowCache:
    """Rows by key, the least recently used goes first; together with their keys never more than
    `bytes_max`. A row that alone is larger is not kept, so 0 keeps none.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._rows: OrderedDict[Hashable, Vector] = OrderedDict()
        self.size_bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        """Rows that are kept."""
        return len(self._rows)

    def get(self, key: Hashable) -> Vector | None:
        """The row, read-only, if it is kept; it counts as used now."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: Hashable, row: Vector) -> None:
        """Keep a copy: a row of a batch would hold the whole batch. A key's row never changes."""
        size = row.nbytes + ENTRY_BYTES
        if size > self._bytes_max or key in self._rows:
            return
        while self.size_bytes + size > self._bytes_max:
            _, oldest = self._rows.popitem(last=False)
            self.size_bytes -= oldest.nbytes + ENTRY_BYTES
            self.evicted += 1
        copy = row.copy()
        copy.flags.writeable = False
        self._rows[key] = copy
        self.size_bytes += size

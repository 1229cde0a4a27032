"""What the one writer last did to each record, for an index whose reads lag behind its writes."""

from collections import OrderedDict
from collections.abc import Iterable


GONE = -1
"""Below every generation: nothing is there to be outranked."""


class Latest:
    """Generations by namespace and id. Bounds: `ids_max`, the least recently written is forgotten.

    Valid while one process writes: the epoch of the writer guards that.
    """

    def __init__(self, ids_max: int) -> None:
        self._ids_max = ids_max
        self._held: OrderedDict[tuple[str, str], int] = OrderedDict()

    def find(self, ns: str, ids: Iterable[str]) -> dict[str, int]:
        """Generations of those that it knows; `GONE` for the deleted."""
        return {key: self._held[ns, key] for key in ids if (ns, key) in self._held}

    def keep(self, ns: str, generations: Iterable[tuple[str, int]]) -> None:
        """A write of these returned; `GONE` where it was a delete."""
        for key, generation in generations:
            self._held[ns, key] = generation
            self._held.move_to_end((ns, key))
        while len(self._held) > self._ids_max:
            self._held.popitem(last=False)

    def forget(self, ns: str, ids: Iterable[str]) -> None:
        """A write of these begins: until it returned, nobody knows what is held."""
        for key in ids:
            self._held.pop((ns, key), None)

    def drop(self, ns: str) -> None:
        """Forget a namespace."""
        for key in [key for key in self._held if key[0] == ns]:
            del self._held[key]

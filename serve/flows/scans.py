"""Reading a whole collection, a part at a time."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from serve.ports import VectorIndex
from serve.records import Filter, Record


@asynccontextmanager
async def scanned(
    index: VectorIndex, ns: str, where: Filter | None = None
) -> AsyncIterator[AsyncIterator[Sequence[Record]]]:
    """The parts of a scan; what it holds is given back when the reader leaves, at the end or before."""
    parts = index.scan(ns, where)
    if isinstance(parts, AsyncGenerator):
        async with aclosing(parts):
            yield parts
    else:
        yield parts

"""Reading a collection part by part: what a scan holds is given back."""

from contextlib import suppress

from serve.flows.scans import scanned


class Index:
    """Two parts; notes when the reader has left."""

    def __init__(self) -> None:
        self.left = False

    async def scan(self, ns, where=None):
        assert (ns, where) == ("ns", None)
        try:
            yield ["a"]
            yield ["b"]
        finally:
            self.left = True


class Plain:
    """An iterator that cannot be closed."""

    def scan(self, *_):
        async def one():
            return ["a"]

        class Parts:
            def __aiter__(self):
                return self

            async def __anext__(self):
                return await one()

        return Parts()


async def test_whoever_leaves_early_closes_the_scan():
    index = Index()
    async with scanned(index, "ns") as parts:
        assert await anext(parts) == ["a"]
        assert not index.left
    assert index.left
    index = Index()
    with suppress(ValueError):
        async with scanned(index, "ns") as parts:
            await anext(parts)
            raise ValueError
    assert index.left


async def test_any_iterator_will_do():
    async with scanned(Plain(), "ns") as parts:
        assert await anext(parts) == ["a"]

"""When the ANN index of a LanceDB table is built: past a size, one at a time, put off when it fails."""

import asyncio
from types import SimpleNamespace

import pytest

from serve.config.index import Lance
from serve.index.lance_ann import NAME, PARTS_MAX, TICKS_MIN, Builds


SETTINGS = Lance(ann_rows_min=80)
ONE, OTHER = "1" * 32, "2" * 32


class Table:
    """Its build goes on until `go`, and fails with what `error` says."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.begun = 0
        self.indices: list[SimpleNamespace] = []
        self.error: Exception | None = None
        self.go = asyncio.Event()

    async def count_rows(self) -> int:
        return self.rows

    async def list_indices(self) -> list[SimpleNamespace]:
        return self.indices

    async def create_index(self, column: str, *, config: object, name: str) -> None:
        self.begun += 1
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.indices.append(SimpleNamespace(name=name, num_segments=1))

    def close(self) -> None:
        """As a table does."""


class Tables(dict[str, Table]):
    async def open(self, ns: str) -> Table | None:
        return self.get(ns)


@pytest.fixture
def tables() -> Tables:
    return Tables({ONE: Table(100), OTHER: Table(100)})


async def settle(builds: Builds) -> None:
    assert builds._task is not None
    await asyncio.wait({builds._task})


async def test_a_small_table_gets_none_and_is_looked_at_again_when_it_has_grown(tables):
    builds, table = Builds(SETTINGS), tables[ONE]
    table.rows = 79
    builds.grew(ONE, 1)
    await builds.tick(tables.open)
    table.rows = 80
    builds.grew(ONE, 9)
    await builds.tick(tables.open)
    assert table.begun == builds.under_way.count(ONE) == 0
    builds.grew(ONE, 1)
    await builds.tick(tables.open)
    assert builds.under_way == ONE
    table.go.set()
    await settle(builds)
    assert [index.name for index in table.indices] == [NAME]
    assert not builds.under_way
    builds.grew(ONE, 1000)
    await builds.tick(tables.open)
    assert table.begun == 1


async def test_an_index_of_many_parts_is_built_anew(tables):
    builds, table = Builds(SETTINGS), tables[ONE]
    table.go.set()
    index = SimpleNamespace(name=NAME, num_segments=PARTS_MAX)
    table.indices = [SimpleNamespace(name="another", num_segments=100), index]
    builds.compacted(ONE)
    await builds.tick(tables.open)
    assert not builds.under_way
    index.num_segments += 1
    await builds.tick(tables.open)
    assert not builds.under_way  # nobody said that there is something new
    builds.compacted(ONE)
    await builds.tick(tables.open)
    await settle(builds)
    assert table.begun == 1


async def test_one_at_a_time_and_none_is_forgotten(tables):
    builds = Builds(SETTINGS)
    builds.grew(ONE, 1)
    builds.grew(OTHER, 1)
    for _ in range(3):
        await builds.tick(tables.open)
        await asyncio.sleep(0)
    assert [table.begun for table in tables.values()] == [1, 0]
    tables[ONE].go.set()
    await settle(builds)
    await builds.tick(tables.open)
    await asyncio.sleep(0)
    assert [table.begun for table in tables.values()] == [1, 1]
    assert builds.under_way == OTHER
    await builds.stop()


@pytest.mark.parametrize("error", [RuntimeError("conflict"), OSError("disk"), ValueError("few")])
async def test_a_build_that_fails_is_put_off_twice_as_long_each_time(tables, caplog, error):
    builds, table = Builds(SETTINGS), tables[ONE]
    table.error = error
    table.go.set()
    builds.grew(ONE, 1)
    for begun, ticks in ((1, TICKS_MIN), (2, 2 * TICKS_MIN), (3, 4 * TICKS_MIN)):
        await builds.tick(tables.open)
        await settle(builds)
        for _ in range(ticks - 1):
            await builds.tick(tables.open)
        assert table.begun == begun
    assert "put off" in caplog.text
    table.error = None
    await builds.tick(tables.open)
    await settle(builds)
    assert table.indices


async def test_a_build_that_takes_too_long_is_put_off(tables, caplog):
    builds = Builds(SETTINGS.model_copy(update={"build_s_max": 0.0}))
    builds.grew(ONE, 1)
    await builds.tick(tables.open)
    await settle(builds)
    assert "TimeoutError" in caplog.text
    assert not builds.under_way


async def test_a_table_that_cannot_be_read_is_put_off(tables, caplog):
    async def broken(ns: str) -> Table | None:
        raise RuntimeError("disk on fire")

    builds = Builds(SETTINGS)
    builds.grew(ONE, 1)
    await builds.tick(broken)
    assert "disk on fire" in caplog.text
    await builds.tick(tables.open)
    assert not builds.under_way


async def test_what_is_dropped_is_not_built(tables):
    builds = Builds(SETTINGS)
    builds.grew(ONE, 1)
    await builds.tick(tables.open)
    await builds.forget(OTHER)
    assert builds.under_way == ONE
    await builds.forget(ONE)
    assert not builds.under_way
    tables[ONE].go.set()
    await builds.tick(tables.open)
    assert not tables[ONE].indices
    builds.grew(OTHER, 1)
    del tables[OTHER]
    await builds.tick(tables.open)
    assert not builds.under_way


async def test_exact_builds_none(tables):
    builds = Builds(SETTINGS.model_copy(update={"exact": True}))
    builds.grew(ONE, 1000)
    await builds.tick(tables.open)
    assert not builds.under_way


async def test_a_fault_of_ours_is_told(tables):
    builds = Builds(SETTINGS)
    tables[ONE].error = AttributeError("ours")
    tables[ONE].go.set()
    builds.grew(ONE, 1)
    await builds.tick(tables.open)
    await settle(builds)
    with pytest.raises(AttributeError):
        await builds.tick(tables.open)
    await builds.tick(tables.open)

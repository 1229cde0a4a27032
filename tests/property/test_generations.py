"""Generations only rise, and `chunks_max` always covers what may lie in the index."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.jobs import catalog, generations, schema
from serve.jobs.generations import Landed
from serve.records import Collection, DocumentWrite


COLLECTION = Collection("0" * 32, "acme", "docs", "m", "r1", 4, 0.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[sa.Engine]:
    made = sa.create_engine("sqlite://")
    with made.begin() as conn:
        schema.create(conn, 0.0)
        catalog.create(conn, COLLECTION, None)
    yield made
    made.dispose()


@contextmanager
def fresh(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A Store as it was at the start: each example is rolled back."""
    with engine.connect() as conn, conn.begin() as transaction:
        yield conn
        transaction.rollback()


@dataclass(frozen=True)
class Step:
    """A write or delete of a document that got as far as `reach` allows before it was cut off.

    `landed` ordinals reached the index, then stale ones were removed, then it was settled.
    """

    document: str
    kind: Literal["write", "delete"]
    chunks: int
    reach: Literal["begun", "landed", "cleaned", "settled"]
    landed: frozenset[int]
    late: bool


STEPS = st.builds(
    Step,
    document=st.sampled_from("abc"),
    kind=st.sampled_from(["write", "write", "delete"]),
    chunks=st.integers(1, 6),
    reach=st.sampled_from(["begun", "landed", "cleaned", "settled"]),
    landed=st.frozensets(st.integers(0, 5)),
    late=st.booleans(),
)


@dataclass
class Index:
    """The ordinals of each document that the index holds, whatever the Store believes."""

    held: dict[str, set[int]] = field(default_factory=dict)

    def land(self, step: Step) -> None:
        ordinals = range(step.chunks)
        part = ordinals if step.reach in {"cleaned", "settled"} else step.landed & {*ordinals}
        self.held.setdefault(step.document, set()).update(part)

    def clean(self, document: str, chunks: int, chunks_max: int) -> None:
        self.held.setdefault(document, set()).difference_update(range(chunks, chunks_max))


def begin(conn: sa.Connection, step: Step) -> tuple[int, int]:
    there = generations.known(conn, COLLECTION.uuid, [step.document])
    if step.kind == "write":
        write = DocumentWrite(step.document, step.chunks)
        (version,) = generations.begin(conn, COLLECTION.uuid, [write], there, 1.0)
    else:
        (version,) = generations.delete(conn, COLLECTION.uuid, [step.document], there, 1.0, sent={})
    return version.generation, version.chunks_max


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=25))
def test_the_bound_covers_the_index_and_generations_rise(engine: sa.Engine, steps: list[Step]):
    latest: dict[str, int] = {}
    index = Index()
    with fresh(engine) as conn:
        for step in steps:
            generation, chunks_max = begin(conn, step)
            previous = latest.get(step.document, 0)
            unknown_delete = step.kind == "delete" and previous == 0
            assert generation == (0 if unknown_delete else previous + 1)
            latest[step.document] = generation

            held = index.held.get(step.document, set())
            assert all(ordinal < chunks_max for ordinal in held)

            chunks = step.chunks if step.kind == "write" else 0
            if step.kind == "write" and step.reach != "begun":
                index.land(step)
            if step.reach in {"cleaned", "settled"}:
                index.clean(step.document, chunks, chunks_max)
                assert index.held[step.document] == set(range(chunks))
            if step.late:  # a settle of the generation before must change nothing
                stale = Landed(step.document, generation - 1, 0)
                generations.settle(conn, COLLECTION.uuid, [stale], 1.0)
            if step.reach == "settled":
                done = Landed(step.document, generation, chunks)
                generations.settle(conn, COLLECTION.uuid, [done], 1.0)


NAMES = st.lists(st.text(max_size=4), unique=True, max_size=12)


@settings(max_examples=60, deadline=None)
@given(first=NAMES, second=NAMES, gone=NAMES)
def test_one_call_for_many_is_many_calls_for_one(engine: sa.Engine, first, second, gone):
    def play(conn: sa.Connection, *, apart: bool) -> list[tuple[str, int, int, bool]]:
        told = []
        for names in (first, second):
            for call in [[name] for name in names] if apart else [names]:
                there = generations.known(conn, COLLECTION.uuid, call)
                writes = [DocumentWrite(name, len(name) + 1) for name in call]
                told.extend(generations.begin(conn, COLLECTION.uuid, writes, there, 1.0))
        for call in [[name] for name in gone] if apart else [gone]:
            there = generations.known(conn, COLLECTION.uuid, call)
            told.extend(generations.delete(conn, COLLECTION.uuid, call, there, 1.0, sent={}))
        return told

    with fresh(engine) as conn:
        together = play(conn, apart=False)
    with fresh(engine) as conn:
        assert together == play(conn, apart=True)

"""However often and in whatever order messages come: of each document the one that was sent last counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.items import SENT, Job, NewItem
from serve.jobs import catalog, schema, submit
from serve.jobs.generations import known
from serve.jobs.job_tables import items
from serve.records import Collection


COLLECTION = Collection("0" * 32, "acme", "docs", "m", "r1", 4, 0.0)
ROOM = submit.Room(10**6, 10**6, 1e12)
NOW = 1e6
_numbers = count()


@dataclass(frozen=True)
class Sent:
    """A message; `at` makes it unique."""

    document: str
    task: Literal["document", "delete"]
    at: float


@pytest.fixture(scope="module")
def engine() -> Iterator[sa.Engine]:
    made = sa.create_engine("sqlite://")
    with made.begin() as conn:
        schema.create(conn, 0.0)
        catalog.create(conn, COLLECTION, None)
    yield made
    made.dispose()


def accept(conn: sa.Connection, batch: list[Sent]) -> None:
    """One job; of a document the message that was sent last, as the flow chooses."""
    last = {one.document: one for one in sorted(batch, key=lambda one: one.at)}
    job = Job(
        f"job_{next(_numbers)}",
        "acme",
        "k",
        "documents",
        "bulk",
        1.0,
        NOW,
        collection=COLLECTION.uuid,
    )
    new = [NewItem(one.document, one.task, "embed", 1.0, {SENT: one.at}) for one in last.values()]
    submit.submit(conn, job, new, None, room=ROOM, now=NOW)


def landing(conn: sa.Connection, document: str) -> float:
    """When the accepted write with the highest generation was sent."""
    rows = sa.select(items.c.payload).where(items.c.name == document, items.c.state != "skipped")
    newest = conn.execute(rows.order_by(items.c.generation.desc(), items.c.id.desc())).first()
    assert newest is not None
    return float(newest.payload[SENT])


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Sent], list[list[Sent]]]:
    """Messages, and batches in which each of them comes at least once."""
    made = draw(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from(["document", "document", "delete"])),
            min_size=1,
            max_size=10,
        )
    )
    sent = [Sent(document, task, float(at)) for at, (document, task) in enumerate(made)]
    again = draw(st.lists(st.sampled_from(sent), max_size=10))
    order = draw(st.permutations([*sent, *again]))
    cuts = sorted(draw(st.sets(st.integers(0, len(order)), max_size=6)) | {0, len(order)})
    return sent, [order[a:b] for a, b in pairwise(cuts)]


@settings(max_examples=150, deadline=None)
@given(deliveries())
def test_the_message_that_was_sent_last_counts(
    engine: sa.Engine, drawn: tuple[list[Sent], list[list[Sent]]]
):
    sent, batches = drawn
    with engine.connect() as conn, conn.begin() as transaction:
        for batch in batches:
            accept(conn, batch)
        last = {one.document: one for one in sent}
        there = known(conn, COLLECTION.uuid, list(last))
        for document, one in last.items():
            assert there[document].sent_at == one.at
            assert there[document].tombstone == (one.task == "delete")
            if one.task == "document":
                assert landing(conn, document) == one.at
        transaction.rollback()

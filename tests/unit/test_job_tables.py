"""What is asked often is found by an index, however much there is."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from serve.jobs import (
    book,
    claims,
    deliveries,
    efforts,
    files,
    handed,
    order,
    progress,
    schema,
    settling,
    submit,
)


MODULES = (book, claims, efforts, handed, order, progress, settling, submit)
APART = {"_EVENT", "_VIEW", "JOBS", "_IN_ORDER"}
"""Parts of statements, each use of which is bounded by a condition; and what is Postgres' own."""

BY = {
    "_HEAD": "ix_items_ready (stage=? AND klass=?)",
    "_HELD": "ix_items_leased (owner=?)",
    "_DUE": "ix_items_delayed (run_at<?)",
    "_SILENT": "ix_owners_alive_until (alive_until<?)",
    "_LOWER": "ix_items_count (job=? AND stage=? AND state=?)",
    "_SHIFT": "ix_items_count (job=? AND stage=? AND state=?)",
    "_RESCALE": "ix_items_count (job=? AND stage=? AND state=?)",
    "_CLOSE_UP": "ix_items_count (job=? AND stage=? AND state=?)",
    "_LOWER_JOBS": "ix_jobs_open (tenant=? AND klass=? AND priority<?)",
    "_THESE": "ix_items_count (job=? AND stage=? AND state=?)",
    "_LEVEL": "ix_flows_finish (stage=? AND klass=?)",
    "_CANCEL": "COVERING INDEX ix_items_count (job=? AND stage=? AND state=?)",
    "_PAUSE": "COVERING INDEX ix_items_count (job=? AND stage=? AND state=?)",
    "_LEFT_TO_CANCEL": "COVERING INDEX ix_items_count (job=? AND stage=? AND state=?)",
    "_PAUSED": "ix_items_count (job=? AND stage=? AND state=?)",
    "_COUNTS": "COVERING INDEX ix_items_count (job=?)",
    "_OF_OPEN_JOBS": "COVERING INDEX ix_items_count (job=? AND stage=?)",
    "_MOVING": "ix_jobs_moving",
    "_UNTOLD": "ix_jobs_untold (told_at<?)",
    "_OVER": "ix_jobs_expiry (expires_at<?)",
    "_OLD": "ix_jobs_finished (finished_at<?)",
    "_OLD_ONCE": "ix_idempotency_expires_at (expires_at<?)",
    "_OF_DAYS": "PRIMARY KEY (day=? AND tenant=?)",
}
SCANS = {"_MOVING"}
"""These read a partial index from its beginning."""


@pytest.fixture(scope="module")
def conn() -> Iterator[sa.Connection]:
    engine = sa.create_engine("sqlite://")
    with engine.begin() as conn:
        schema.create(conn, 0.0)
        yield conn
    engine.dispose()


def statements() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        for name, value in vars(module).items():
            kinds = (sa.Select, sa.Update, sa.Delete)
            if isinstance(value, kinds) and name not in APART and name.isupper():
                yield f"{module.__name__.rsplit('.', 1)[1]}.{name}", value


def plan(conn: sa.Connection, statement: Any) -> str:
    text = str(statement.compile(dialect=conn.dialect))
    text = re.sub(r"\(__\[POSTCOMPILE_\w+(~~\w+~~.*?~~\w+~~)?\]\)", "(?, ?)", text)
    rows = conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * text.count("?"))
    return "\n".join(row[3] for row in rows)


@pytest.mark.parametrize(("name", "statement"), [*statements()])
def test_no_table_is_read_through(conn: sa.Connection, name: str, statement: Any):
    found = plan(conn, statement)
    short = name.rsplit(".", 1)[1]
    assert short in SCANS or not re.search(r"SCAN (?!anon|free|\(subquery)", found), found
    assert BY.get(short, "") in found


def test_every_statement_that_is_named_is_there():
    assert {name.rsplit(".", 1)[1] for name, _ in statements()} >= set(BY)


@pytest.mark.parametrize(("name", "statement"), [*statements()])
def test_every_statement_compiles_for_postgres(name: str, statement: Any):
    assert str(statement.compile(dialect=postgresql.dialect())), name


def test_dead_items_are_listed_by_their_own_index(conn: sa.Connection):
    some = handed._VIEW.where(handed.items.c.job == "j", handed.items.c.seq > 3, handed._IS_DEAD)
    assert "ix_items_dead (job=? AND seq>?)" in plan(conn, some.order_by(handed.items.c.seq))


def plans(conn: sa.Connection, work: Callable[[], Any]) -> list[str]:
    """How SQLite would find what `work` asks for."""
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, text: str, values: Any, *_: Any) -> None:
        asked.append((text, values))

    sa.event.listen(conn, "before_cursor_execute", note)
    work()
    sa.event.remove(conn, "before_cursor_execute", note)
    rows = (conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values) for text, values in asked)
    return [row[3] for some in rows for row in some]


BY_ID = "USING INDEX sqlite_autoindex_{table}_1 (id=?)"


@pytest.mark.parametrize("after", ["", "job_5"])
@pytest.mark.parametrize("kind", [None, "documents", "embeddings"])
@pytest.mark.parametrize("states", [(), ("failed",), ("running", "completed")])
def test_no_listing_of_jobs_reads_past_others(
    conn: sa.Connection, kind: Any, states: Any, after: str
):
    found = plans(
        conn, lambda: handed.listed(conn, "a", kind=kind, states=states, after=after, limit=9)
    )
    runs = [line for line in found if "ix_jobs_listed" in line]
    assert len(runs) == (1 if kind else 2) * (len(states) or 10)
    bound = " AND id<?" if after else ""
    for line in runs:
        assert f"ix_jobs_listed (tenant=? AND kind=? AND state=?{bound})" in line
    others = [line for line in found if "jobs" in line and line not in runs]
    assert others == [f"SEARCH jobs {BY_ID.format(table='jobs')}"]


@pytest.mark.parametrize("states", [(), ("given_up",), ("waiting", "delivered")])
def test_no_listing_of_deliveries_reads_past_others(
    conn: sa.Connection, states: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(deliveries.webhook_rows, "mine", lambda *_: None)
    found = plans(
        conn,
        lambda: deliveries.listed(conn, "a", "w", states=states, after="msg_5", limit=9),
    )
    runs = [line for line in found if "ix_deliveries_listed" in line]
    assert len(runs) == (len(states) or 4)
    assert all("(webhook=? AND state=? AND id<?)" in line for line in runs)
    others = [line for line in found if "deliveries" in line and line not in runs]
    assert others == [f"SEARCH deliveries {BY_ID.format(table='deliveries')}"]


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_page_of_files_is_read_from_its_place_on(conn: sa.Connection, order: Any):
    [line] = plans(
        conn,
        lambda: files.listed(
            conn, "a", purpose=None, order=order, after="file-5", limit=9, now=1.0
        ),
    )
    sign = "<" if order == "desc" else ">"
    assert line == f"SEARCH files USING INDEX ix_files_listed (tenant=? AND id{sign}?)"

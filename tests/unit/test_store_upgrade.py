"""A Store of an older version becomes one of this version when it is opened, whole or not at all."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from serve.config import Store
from serve.errors import StoreUnavailable
from serve.jobs import schema
from serve.jobs.owner import StoreOwner
from serve.records import Key, Tenant


# What the program wrote when the version was 1.
VERSION_1 = """
CREATE TABLE store (one INTEGER NOT NULL, version INTEGER NOT NULL, identity VARCHAR NOT NULL,
    created_at DOUBLE NOT NULL, PRIMARY KEY (one));
CREATE TABLE tenants (tenant VARCHAR NOT NULL, tier VARCHAR NOT NULL, created_at DOUBLE NOT NULL,
    PRIMARY KEY (tenant));
CREATE TABLE keys (id VARCHAR NOT NULL, tenant VARCHAR NOT NULL, secret_sha256 VARCHAR NOT NULL,
    created_at DOUBLE NOT NULL, revoked_at DOUBLE, PRIMARY KEY (id));
CREATE TABLE collections (uuid VARCHAR NOT NULL, tenant VARCHAR NOT NULL, name VARCHAR NOT NULL,
    model VARCHAR NOT NULL, revision VARCHAR NOT NULL, dimensions INTEGER NOT NULL,
    created_at DOUBLE NOT NULL, deleted_at DOUBLE, PRIMARY KEY (uuid));
CREATE UNIQUE INDEX ix_collections_live ON collections (tenant, name) WHERE deleted_at IS NULL;
CREATE INDEX ix_collections_deleted ON collections (deleted_at) WHERE deleted_at IS NOT NULL;
CREATE TABLE documents (collection VARCHAR NOT NULL, document VARCHAR NOT NULL,
    generation BIGINT NOT NULL, chunks_max INTEGER NOT NULL, chunks INTEGER NOT NULL,
    tombstone BOOLEAN NOT NULL, updated_at DOUBLE NOT NULL, PRIMARY KEY (collection, document)
) WITHOUT ROWID;
CREATE TABLE epochs (name VARCHAR NOT NULL, deploy_seq BIGINT NOT NULL, epoch BIGINT NOT NULL,
    PRIMARY KEY (name));
CREATE TABLE operations (op VARCHAR NOT NULL, method VARCHAR NOT NULL, result JSON NOT NULL,
    at DOUBLE NOT NULL, PRIMARY KEY (op));
CREATE INDEX ix_operations_at ON operations (at);

INSERT INTO store VALUES (1, 1, '0123456789abcdef0123456789abcdef', 1.0);
INSERT INTO tenants VALUES ('acme', 'premium', 1.5);
INSERT INTO keys VALUES ('k1', 'acme', 'abab', 2.5, NULL), ('gone', 'acme', 'cdcd', 2.5, 3.5);
INSERT INTO operations VALUES ('op', 'create_key', 'null', 999.0);
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    with closing(sqlite3.connect(path)) as conn:
        conn.executescript(VERSION_1)
    return path


@pytest.fixture
def opened(path: Path, clock: Callable[[], float]) -> Iterator[Callable[[], StoreOwner]]:
    owners: list[StoreOwner] = []

    def open_() -> StoreOwner:
        owners.append(StoreOwner(path, Store(lock_wait_s=0.01), clock))
        return owners[-1]

    yield open_
    for owner in owners:
        owner.close()


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute("SELECT version FROM store").fetchone()[0]


async def test_what_an_older_program_kept_is_there(opened: Callable[[], StoreOwner], path: Path):
    owner = opened()
    kept = Key("k1", "acme", "premium", "abab", 2.5, family="k1")
    assert await owner.find_key("k1") == kept
    assert await owner.list_keys() == [kept]
    assert await owner.find_tenant("acme") == Tenant("acme", "premium", 1.5)
    await owner.create_key("op", Key("k1", "acme", "free", "", 1.0))  # a repeat from before
    assert await owner.list_audit(None, None, 10) == []
    assert version(path) == schema.VERSION


async def test_it_can_do_all_that_a_new_one_can(opened: Callable[[], StoreOwner]):
    owner = opened()
    await owner.rotate_key("1", "k1", Key("k2", "", "", "efef", 5.0), 60, "cli:ann@host")
    owner.close()
    again = opened()  # and is opened as any other
    assert [key.family for key in await again.list_keys()] == ["k1", "k1"]
    assert [entry.action for entry in await again.list_audit("acme", None, 10)] == ["key.rotate"]


def shape(engine: sa.Engine) -> dict[str, Any]:
    """What can be seen of the tables, without the two names of the type Double."""
    inspector = sa.inspect(engine)
    return {
        table: {
            "columns": [
                (
                    each["name"],
                    each["type"]._type_affinity.__name__,
                    each["nullable"],
                    each["default"],
                )
                for each in inspector.get_columns(table)
            ],
            "key": inspector.get_pk_constraint(table)["constrained_columns"],
            "indexes": sorted(
                (
                    each["name"],
                    tuple(each["column_names"]),
                    each["unique"],
                    str(each["dialect_options"].get("sqlite_where", "")),
                )
                for each in inspector.get_indexes(table)
            ),
        }
        for table in inspector.get_table_names()
    }


@pytest.mark.parametrize("had", range(1, schema.VERSION))
def test_an_upgraded_store_has_the_tables_of_a_new_one(path: Path, had: int):
    old, new = sa.create_engine(f"sqlite:///{path}"), sa.create_engine("sqlite://")
    with old.begin() as conn:
        for step in range(2, had + 1):
            for statement in schema.STEPS[step]:
                conn.execute(statement)
        conn.execute(sa.update(schema.store).values(version=had))
    with old.begin() as conn:
        assert schema.upgrade(conn) == had
    with new.begin() as conn:
        schema.create(conn, 1.0)
        assert schema.upgrade(conn) == schema.VERSION
    assert shape(old) == shape(new)
    assert shape(new)["keys"]["columns"]
    old.dispose()
    new.dispose()


def test_a_store_of_version_3_is_upgraded_from_what_it_was(path: Path):
    engine = sa.create_engine(f"sqlite:///{path}")

    def listed() -> set[str]:
        names = sa.text("SELECT name FROM sqlite_master WHERE type = 'index'")
        with engine.connect() as conn:
            return set(conn.execute(names).scalars())

    had = {"ix_jobs_tenant", "ix_files_tenant", "ix_deliveries_webhook"}
    new = {"ix_jobs_listed", "ix_files_listed", "ix_deliveries_listed"}
    with engine.begin() as conn:
        for step in (2, 3):
            for statement in schema.STEPS[step]:
                conn.execute(statement)
        conn.execute(sa.update(schema.store).values(version=3))
    assert listed() & (had | new) == had
    with engine.begin() as conn:
        assert schema.upgrade(conn) == 3
    assert listed() & (had | new) == new
    engine.dispose()


def test_an_upgrade_that_fails_half_way_changes_nothing(
    opened: Callable[[], StoreOwner], path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps = {2: (*schema.STEPS[2], sa.text("INSERT INTO nowhere VALUES (1)"))}
    monkeypatch.setattr(schema, "STEPS", steps)
    with pytest.raises(StoreUnavailable, match="nowhere"):
        opened()
    assert version(path) == 1
    with closing(sqlite3.connect(path)) as conn:
        assert len(conn.execute("SELECT * FROM keys").fetchone()) == 5
    monkeypatch.undo()
    opened()
    assert version(path) == schema.VERSION


def test_there_is_a_step_to_every_version():
    assert list(schema.STEPS) == list(range(2, schema.VERSION + 1))


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()])
def test_every_step_compiles(dialect: sa.Dialect):
    for statements in schema.STEPS.values():
        for statement in statements:
            assert str(statement.compile(dialect=dialect))


def test_numbers_of_the_log_are_given_by_the_database():
    for dialect, words in (
        (sqlite.dialect(), "AUTOINCREMENT"),
        (postgresql.dialect(), "BIGSERIAL"),
    ):
        assert words in str(CreateTable(schema.audit).compile(dialect=dialect))


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()])
def test_the_condition_of_an_index_is_literal(dialect: sa.Dialect):
    """With a bound value it would serve no query."""
    (index,) = schema.usage_month.indexes
    assert "WHERE session != ''" in str(CreateIndex(index).compile(dialect=dialect))

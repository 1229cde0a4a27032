"""The tables mean the same on SQLite and on Postgres."""

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from serve.jobs import schema, tables


DIALECTS = pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()])


@DIALECTS
def test_every_table_compiles(dialect: sa.Dialect):
    for table in schema.metadata.sorted_tables:
        assert table.name in str(CreateTable(table).compile(dialect=dialect))


@DIALECTS
def test_only_live_names_are_unique(dialect: sa.Dialect):
    (index,) = (each for each in tables.collections.indexes if each.unique)
    text = str(CreateIndex(index).compile(dialect=dialect))
    assert "UNIQUE" in text
    assert "(tenant, name) WHERE deleted_at IS NULL" in text


def test_an_empty_database_has_no_identity_until_it_is_made():
    engine = sa.create_engine("sqlite://")
    with engine.begin() as conn:
        assert schema.identity(conn) is None
        assert schema.create(conn, 1.0) == schema.identity(conn)
    engine.dispose()

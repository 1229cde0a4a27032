"""What errors of Postgres mean, by SQLSTATE; and the settings that the index needs."""

import psycopg
import pytest
from pydantic import ValidationError

from deployments.indexes import make_index
from serve.config import Index as IndexSettings
from serve.config import Settings
from serve.index.errors import BatchTooLarge, IndexOffline, IndexRetryable, RecordsRejected
from serve.index.pg_connections import fault
from serve.index.pgvector import PgIndex


@pytest.mark.parametrize(
    ("states", "meaning"),
    [
        ("08006 40001 40P01 53200 53300 55P03 57014 57P01 57P03 25P03 42P01", IndexRetryable),
        ("22003 22P05 23502 23505", RecordsRejected),
        ("54000", BatchTooLarge),
        ("28P01 28000 3D000 3F000 42501 42704 53100 57P04 25006 58030 XX001 0A000", IndexOffline),
    ],
)
def test_by_class(states, meaning):
    for state in states.split():
        error = type("Error", (psycopg.Error,), {"sqlstate": state})("said so")
        found = fault(error)
        assert isinstance(found, meaning), state
        assert "said so" in str(found)


def test_only_the_batch_is_refused_not_a_record():
    found = fault(psycopg.errors.NumericValueOutOfRange())
    assert isinstance(found, RecordsRejected)
    assert found.pairs is None


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        ("connection failed: FATAL:  password authentication failed for user x", IndexOffline),
        ("connection failed: FATAL:  no pg_hba.conf entry for host", IndexOffline),
        ("connection failed: Connection refused", IndexRetryable),
        ("connection failed: FATAL:  sorry, too many clients already", IndexRetryable),
        ("connection failed: FATAL:  too many connections for role x", IndexRetryable),
        ("the connection is lost", IndexRetryable),
    ],
)
def test_a_failed_connection_has_no_sqlstate(message, meaning):
    assert isinstance(fault(psycopg.OperationalError(message)), meaning)


class _Failed:
    used_password, needs_password = True, False


def test_a_password_that_was_asked_for_says_it_in_any_language():
    error = psycopg.OperationalError("Anmeldung fehlgeschlagen")
    assert isinstance(fault(error), IndexRetryable)
    error._pgconn = _Failed()
    assert isinstance(fault(error), IndexOffline)


def test_what_psycopg_itself_cannot_write_is_rejected():
    assert isinstance(fault(psycopg.DataError("no NUL")), RecordsRejected)


def test_settings_that_make_no_sense_name_their_field():
    with pytest.raises(ValidationError, match=r"index\.pgvector\.url_env"):
        IndexSettings(backend="pgvector")
    with pytest.raises(ValidationError, match=r"index\.pgvector\.ef_construction"):
        IndexSettings.model_validate({"pgvector": {"m": 40, "ef_construction": 64}})
    with pytest.raises(ValidationError, match="schema_name"):
        IndexSettings.model_validate({"pgvector": {"schema_name": 'a"; DROP'}})


CHOSEN = Settings.model_validate(
    {"index": {"backend": "pgvector", "pgvector": {"url_env": "PG_URL"}}}
)


def test_the_settings_choose_it(monkeypatch):
    monkeypatch.setenv("PG_URL", "postgresql://user:pw@db/name")
    made = make_index(CHOSEN)
    assert isinstance(made, PgIndex)
    assert made.caps.max_dim == 16_000
    assert not made.caps.single_writer


def test_a_url_that_is_missing_or_none_is_said_without_its_text(monkeypatch):
    monkeypatch.delenv("PG_URL", raising=False)
    with pytest.raises(RuntimeError, match="PG_URL is not set"):
        make_index(CHOSEN)
    for wrong in ("http://user:secret@db", "postgresql://user:secret%zz@db"):
        monkeypatch.setenv("PG_URL", wrong)
        with pytest.raises(RuntimeError, match=r"index\.pgvector\.url_env: PG_URL") as caught:
            make_index(CHOSEN)
        assert "secret" not in repr(caught.value)

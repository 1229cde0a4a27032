"""SQL of the pgvector index as text, without a server; what it finds, the contract tests say."""

import json
from typing import Any

import numpy as np
import pytest

from serve.index.filters import parse
from serve.index.pg_statements import Table, to_pairs, to_rows, to_sql
from serve.records import Record, Tombstone


NS = "f0" * 16
TABLE = Table("an index", NS)


def record(name: str, **metadata: Any) -> Record:
    return Record(name, "d", 3, 0, np.ones(2), "a\x00ü", metadata=metadata)


def test_a_filter_is_parameters_and_names_are_quoted():
    params: dict[str, Any] = {}
    raw = {"$or": [{"'; DROP": {"$in": ["x' --", 1]}}, {"{} %s": {"$gt": "%(top_k)s"}}]}
    text = TABLE.nearest(to_sql(parse(raw, terms_max=8), params)).as_string(None)
    assert f'FROM "an index"."v_{NS}"' in text
    assert not any(word in text for word in ("DROP", "--", "{}", "%s"))
    assert all(f"%({name})s" in text for name in params)
    assert len(params) == 5


def test_what_is_written_of_a_users_text_is_ascii():
    [terms], [body] = (
        to_rows([record("a", größe="\x00\ud800")])[key] for key in ("terms", "bodies")
    )
    assert (terms + body).isascii()
    assert "\\u0000" not in terms


def test_terms_say_their_type_and_leave_out_what_no_filter_can_name():
    written = record(
        "a", s="1", n=1, b=True, l=[True, 1, "1", 1.0], **{"": 1, "a\nb": 1, "k" * 257: 1}
    )
    [terms] = to_rows([written])["terms"]
    values = json.loads(terms)
    assert sorted(values) == sorted(name.encode().hex() for name in "snbl")
    one = values["6e"]
    assert (values["73"], one[0], values["62"]) == ("s31", "n", "b1")
    assert values["6c"] == sorted(["b1", one, "s31"])


def test_rows_are_in_the_order_of_ids():
    assert to_rows([record("b"), record("a"), record("B")])["ids"] == ["B", "a", "b"]
    pairs = to_pairs([Tombstone("b", "d", 1), Tombstone("a", "d", 2)])
    assert pairs == {"ids": ["a", "b"], "generations": [2, 1]}


def test_what_is_not_json_is_an_error():
    with pytest.raises(ValueError, match="JSON"):
        to_rows([record("a", x=float("nan"))])


@pytest.mark.parametrize(
    ("dimensions", "held"),
    [(2000, "(embedding)"), (2001, "(l2_normalize(embedding)::halfvec(2001))")],
)
def test_a_query_orders_by_what_the_index_holds(dimensions, held):
    made = TABLE.create_hnsw(dimensions, 16, 64).as_string(None)
    asked = TABLE.nearest_roughly(to_sql(None, {}), dimensions).as_string(None)
    assert held in made
    assert f"ORDER BY {held[1:-1]} <=>" in asked


def test_the_key_of_a_lock_is_a_bigint():
    assert -(2**63) <= TABLE.key < 0 <= Table("s", "0" * 31 + "1").key

"""`GET /v1/collections/{name}/export`: all of a collection, to its owner only, and how faults show."""

import base64
import io
import json
import operator
import sys

import numpy as np
import pytest

from serve.config import Ingress
from serve.errors import IndexUnavailable
from serve.flows import exports


BOOKS = "/v1/collections/books"
URL = f"{BOOKS}/export"
TEXT = "water falls through the headrace and " * 3


def problem(response, status):
    assert response.status_code == status, response.text
    return response.json()


def row(*values: float) -> list[float]:
    return [*values, *[0.0] * (16 - len(values))]


async def lines(client, query=""):
    answer = await client.get(f"{URL}{query}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("application/jsonl")
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text[:-1].split("\n")]


@pytest.fixture
async def books(client):
    """Two raw vectors, and a document of several chunks."""
    await client.post("/v1/collections", json={"name": "books"})
    raw = [
        {"id": "a", "vector": row(3, 4), "text": "t", "metadata": {"tags": ["x"]}},
        {"id": "b\u2028", "vector": row(0.1)},
    ]
    await client.post(f"{BOOKS}/vectors", json={"vectors": raw})
    await client.post(f"{BOOKS}/documents", json={"documents": [{"id": "doc", "text": TEXT}]})
    return client


async def test_every_record_is_a_line_and_the_last_one_counts_them(books, monkeypatch):
    whole = await lines(books)
    assert whole[-1] == {"object": "export.end", "records": len(whole) - 1}
    by_id = {(one["id"], one["chunk"]): one for one in whole[:-1]}
    assert len(by_id) == len(whole) - 1 == (await books.get(BOOKS)).json()["records"] > 3
    assert by_id["a", 0] == {
        "id": "a",
        "chunk": 0,
        "vector": row(3, 4),
        "text": "t",
        "start": 0,
        "end": 1,
        "metadata": {"tags": ["x"]},
        "generation": 1,
    }
    assert by_id["b\u2028", 0]["vector"] == pytest.approx(row(0.1))
    chunk = by_id["doc", 1]
    assert chunk["text"] == TEXT[chunk["start"] : chunk["end"]]
    monkeypatch.setattr(exports, "SLICE_BYTES", 1)  # a record at a time
    assert await lines(books) == whole


async def test_what_was_exported_can_be_written_again(books):
    *found, _ = await lines(books, "?format=jsonl&encoding_format=base64")
    (one,) = (one for one in found if one["id"] == "a")
    assert base64.b64decode(one["vector"]) == np.array(row(3, 4), "<f4").tobytes()
    await books.post("/v1/collections", json={"name": "copy"})
    again = {name: one[name] for name in ("id", "vector", "text", "metadata")}
    answer = await books.post("/v1/collections/copy/vectors", json={"vectors": [again]})
    assert answer.json()["data"][0]["status"] == "indexed"


async def test_parquet_holds_the_same(books, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(exports, "GROUP_BYTES", 1)
    monkeypatch.setattr(exports, "SLICE_BYTES", 300)
    answer = await books.get(f"{URL}?format=parquet")
    assert answer.headers["content-type"] == "application/vnd.apache.parquet"
    assert answer.headers["content-disposition"] == 'attachment; filename="books.parquet"'
    file = parquet.ParquetFile(io.BytesIO(answer.content))
    assert file.num_row_groups > 1
    *expected, _ = await lines(books)
    found = [{**one, "metadata": json.loads(one["metadata"])} for one in file.read().to_pylist()]
    key = operator.itemgetter("id", "chunk")
    for one, other in zip(sorted(found, key=key), sorted(expected, key=key), strict=True):
        assert one.pop("vector") == pytest.approx(other.pop("vector"))
        assert one == other


async def test_parquet_without_pyarrow_is_refused(books, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = await books.get(f"{URL}?format=parquet")
    assert problem(answer, 400)["param"] == "format"


async def test_an_empty_collection_is_its_last_line(client):
    await client.post("/v1/collections", json={"name": "books"})
    assert await lines(client) == [{"object": "export.end", "records": 0}]


async def test_the_reply_is_a_file(books):
    answer = await books.get(URL)
    assert answer.headers["content-disposition"] == 'attachment; filename="books.jsonl"'
    assert answer.headers["cache-control"] == "no-store"


async def test_what_is_asked_is_checked(books):
    for query, param in (
        ("?format=csv", "format"),
        ("?format=jsonl&format=jsonl", "format"),
        ("?encoding_format=hex", "encoding_format"),
    ):
        assert problem(await books.get(f"{URL}{query}"), 400)["param"] == param


async def test_another_tenants_collection_does_not_exist(books, whole):
    stranger = await whole.client("other")
    assert problem(await stranger.get(URL), 404)["code"] == "collection_not_found"
    await stranger.post("/v1/collections", json={"name": "books"})
    assert len(await lines(stranger)) == 1
    nobody = await whole.client(None)
    assert (await nobody.get(URL)).status_code == 401


async def test_exports_at_once_are_bounded(start):
    whole = await start(ingress=Ingress(tenant_exports_max=1, exports_max=2))
    client, other = await whole.client(), await whole.client("other")
    for one in (client, other):
        await one.post("/v1/collections", json={"name": "books"})
    with whole.service.exports.places.open("acme"):
        refused = await client.get(URL)
        assert problem(refused, 429)["code"] == "exports"
        assert int(refused.headers["retry-after"]) > 0
        await lines(other)
        with whole.service.exports.places.open("third"):
            assert problem(await other.get(URL), 503)["code"] == "overloaded"
    await lines(client)
    assert whole.service.exports.places.count == 0


async def test_a_fault_before_the_first_line_is_a_status(books, whole, monkeypatch):
    async def away(*_):
        raise IndexUnavailable("Away.", retry_after_s=1)
        yield

    monkeypatch.setattr(type(whole.index), "scan", away)
    assert problem(await books.get(URL), 503)["code"] == "index_unavailable"
    assert whole.service.exports.places.count == 0


async def test_a_fault_after_it_cuts_the_reply(books, whole, monkeypatch):
    scan = type(whole.index).scan

    async def breaks(index, ns, where=None):
        async for part in scan(index, ns, where):
            yield part
        raise IndexUnavailable("Away.")

    monkeypatch.setattr(type(whole.index), "scan", breaks)
    with pytest.raises(RuntimeError, match="response already started"):  # a server cuts it then
        await books.get(URL)
    assert whole.service.exports.places.count == 0


async def test_an_export_is_one_request_of_class_bulk(whole):
    client = await whole.client("free")
    await client.post("/v1/collections", json={"name": "books"})
    answer = await client.get(URL)
    assert answer.headers["x-ratelimit-remaining-requests"] == "9"
    assert answer.headers["x-ratelimit-limit-tokens"] == "200"

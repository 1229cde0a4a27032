import json

import pytest

from serve.config import Files, Limits, Model, Pool, Settings
from serve.flows.batch_file import BatchSheet, read_line
from serve.flows.models import Models
from serve.flows.sheet import FAULTS_MAX
from serve.records import Collection


PLAIN = Model(id="plain", engine="fake", dimensions=16, tokens_max=64)
NESTED = Model(id="nested", engine="fake", dimensions=32, tokens_max=64, matryoshka=True)
COLLECTION = Collection("0" * 32, "acme", "books", "nested", "r", 32, 0.0)


def settings(**changes):
    return Settings(**{"pools": (Pool(models=(PLAIN, NESTED)),), **changes})


def line(custom_id="a", **changes):
    body = changes.pop("body", {"model": "plain", "input": "text"})
    whole = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps(whole | changes).encode()


def sheet(data, *, step=None, collection=None, **changes):
    rules = settings(**changes)
    made = BatchSheet(rules, Models.open(rules, {"default": None}), collection)
    step = step or len(data) or 1
    for at in range(0, len(data), step):
        if made.stopped:
            break
        made.feed(data[at : at + step])
    made.close()
    return made


def told(made):
    return [(fault["line"], fault["code"], fault["param"]) for fault in made.faults]


@pytest.mark.parametrize("step", [1, 7, 64, None])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n\n  \n"])
def test_each_line_is_found_where_it_stands(step, end):
    texts = {"a": "one", "b": ["two", "tree"], "c": [[1, 2, 3]], "d\u00e9": "x" * 100}
    lines = [line(name, body={"model": "plain", "input": text}) for name, text in texts.items()]
    data = b"\n\n".join(lines) + end
    made = sheet(data, step=step)
    assert made.faults == []
    assert [entry.custom_id for entry in made.entries] == list(texts)
    assert [entry.inputs for entry in made.entries] == [1, 2, 1, 1]
    for entry, raw in zip(made.entries, lines, strict=True):
        assert data[entry.start : entry.start + entry.length].strip() == raw
        request = read_line(data[entry.start : entry.start + entry.length], settings())
        assert request.custom_id == entry.custom_id
    costs = [entry.cost for entry in made.entries]
    assert costs == [3 / 4 + 32, 7 / 4 + 64, 3 + 32, 100 / 4 + 32]
    assert made.entries[1].item().payload == {
        "start": made.entries[1].start,
        "length": made.entries[1].length,
        "inputs": 2,
    }


def test_a_line_costs_what_it_takes_to_read_it_too():
    body = {"model": "plain", "input": "text", "user": "x" * 80_000}
    raw = line(body=body)
    (entry,) = sheet(raw).entries
    assert entry.item().cost == len(raw) / 8 > 10_000


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"{}", "missing_required_parameter", "custom_id"),
        (line(""), "missing_required_parameter", "custom_id"),
        (line(7), "missing_required_parameter", "custom_id"),
        (line("a" * 513), "invalid_custom_id", "custom_id"),
        (line("a\u0000"), "invalid_custom_id", "custom_id"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/chat/completions"), "invalid_url", "url"),
        (line(body="x"), "missing_required_parameter", "body"),
        (line(body={"input": "x"}), "invalid_request", "body.model"),
        (line(body={"model": "plain"}), "invalid_request", "body.input"),
        (line(body={"model": "plain", "input": ["x", ""]}), "invalid_request", "body.input[1]"),
        (line(body={"model": "nested", "input": "x"}), "mismatched_model", "body.model"),
        (
            line(body={"model": "plain", "input": "x", "dimensions": 8}),
            "dimensions_not_supported",
            "body.dimensions",
        ),
        (
            line(body={"model": "plain", "input": "x", "output_dtype": "int4"}),
            "invalid_request",
            "body.output_dtype",
        ),
        (
            line(body={"model": "plain", "input": "x", "encoding_format": "hex"}),
            "invalid_request",
            "body.encoding_format",
        ),
    ],
)
def test_a_fault_names_its_line_and_field(raw, code, param):
    made = sheet(b"\n".join([line("first"), b"", raw, line("last")]))
    assert told(made) == [(3, code, param)]
    assert made.faults[0]["message"]


def test_the_models_of_a_file_are_served():
    assert told(sheet(line(body={"model": "none", "input": "x"}))) == [
        (1, "model_not_found", "body.model")
    ]


def test_every_fault_is_told_up_to_a_bound():
    made = sheet(b"\n".join([b"x"] * 200))
    assert [fault["line"] for fault in made.faults] == list(range(1, FAULTS_MAX + 1))
    assert made.stopped


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_file_is_a_fault(data):
    assert told(sheet(data)) == [(None, "empty_file", None)]


def test_lines_and_inputs_are_bounded():
    data = b"\n".join(line(str(number)) for number in range(4))
    assert len(sheet(data, files=Files(lines_max=4)).entries) == 4
    assert told(sheet(data, files=Files(lines_max=3))) == [(4, "too_many_requests", None)]
    assert told(sheet(data, files=Files(inputs_max=2))) == [(3, "too_many_inputs", None)]


def test_an_endless_line_is_not_held():
    data = line("a") + b"\n" + b"x" * 5000
    made = sheet(data, step=100, limits=Limits(body_bytes_max=1024))
    assert told(made) == [(2, "line_too_long", None)]


def test_bits_need_whole_bytes():
    body = {"model": "nested", "input": "x", "output_dtype": "binary"}
    made = sheet(b"\n".join([line("a", body=body), line("b", body={**body, "dimensions": 9})]))
    assert told(made) == [(2, "invalid_request", "body.output_dtype")]


def test_what_lands_in_a_collection_fits_it():
    def one(**body):
        return told(sheet(line(body={"input": "x", **body}), collection=COLLECTION))

    assert one(model="nested") == []
    assert one(model="nested", dimensions=32) == []
    assert one(model="plain") == [(1, "mismatched_model", "body.model")]
    assert one(model="nested", dimensions=8) == [(1, "invalid_request", "body.dimensions")]
    assert one(model="nested", output_dtype="float") == []
    assert one(model="nested", output_dtype="int8") == [(1, "invalid_request", "body.output_dtype")]
    assert one(model="nested", input=[1, 2]) == [(1, "invalid_request", "body.input")]

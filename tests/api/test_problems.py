"""Errors on the wire: one row a class, both shapes, and nothing of ours in a body."""

import json
import logging
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve.api.app import create_app
from serve.api.problems import TABLE, openai_body, problem_body, retry_headers
from serve.api.rates import duration
from serve.errors import Conflict, QuotaExceeded, ServiceError, TooLarge


DOCS = Path(__file__).parents[2] / "docs"


def classes(kind=ServiceError):
    for one in kind.__subclasses__():
        yield one
        yield from classes(one)


def in_package():
    return [kind for kind in classes() if kind.__module__ == "serve.errors"]


def made(kind):
    return kind("What went wrong.", param="input[3]", code="a_code", retry_after_s=1.5)


# --- the table -------------------------------------------------------------------------------


def test_each_error_has_exactly_one_row():
    assert set(TABLE) == set(in_package())
    assert len(in_package()) > 10


@pytest.mark.parametrize("kind", in_package(), ids=lambda kind: kind.__name__)
def test_each_error_survives_a_handle_and_both_shapes(kind):
    error = pickle.loads(pickle.dumps(made(kind)))  # noqa: S301  our own
    assert type(error) is kind
    assert vars(error) == vars(made(kind))
    shown = openai_body(error)["error"]
    assert set(shown) == {"message", "type", "param", "code"}
    assert (shown["message"], shown["param"]) == ("What went wrong.", "input[3]")
    body = problem_body(error, "/v1/collections/a b\u00e9")
    assert (body["status"], body["code"], body["param"]) == (kind.status, "a_code", "input[3]")
    assert body["instance"] == "/v1/collections/a%20b%C3%A9"
    assert body["title"]
    assert 400 <= kind.status <= 599


def test_each_error_is_documented():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (\d{3}) \|", page, re.MULTILINE))
    assert table == {kind.code: str(kind.status) for kind in in_package()}


def test_each_finer_code_is_documented():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (DOCS.parent / "serve").rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r'\bcode="(\w+)"', text)}
    assert len(codes) > 10
    assert {code for code in codes if f"`{code}`" not in page} == set()


def test_only_what_waiting_cures_says_how_long():
    assert retry_headers(QuotaExceeded("x", retry_after_s=0.0004)) == {
        "retry-after": "1",
        "retry-after-ms": "1",
    }
    assert retry_headers(QuotaExceeded("x", retry_after_s=1e9))["retry-after"] == "120"
    assert retry_headers(QuotaExceeded("x")) == {"x-should-retry": "false"}
    assert retry_headers(Conflict("x")) == {"x-should-retry": "false"}
    assert retry_headers(TooLarge("x")) == {}


def test_durations_are_written_as_openai_does():
    examples = {
        0: "0ms",
        0.0121: "12ms",
        0.9996: "1s",
        1: "1s",
        1.001: "2s",
        59: "59s",
        360: "6m0s",
        3723: "1h2m3s",
    }
    assert {seconds: duration(seconds) for seconds in examples} == examples


# --- the app ---------------------------------------------------------------------------------


def test_openapi_is_the_committed_one():
    """`python -m serve.api > docs/openapi.json` writes it anew."""
    committed = json.loads((DOCS / "openapi.json").read_text(encoding="utf-8"))
    assert create_app(lambda: pytest.fail("no request was made")).openapi() == committed


def test_every_route_is_documented():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    routes = json.loads((DOCS / "openapi.json").read_text(encoding="utf-8"))["paths"]
    for path, operations in routes.items():
        for method in operations:
            assert f"{method.upper()} {path}" in page


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/collections"])
async def test_a_fault_of_ours_is_a_500_that_tells_nothing(whole, path, monkeypatch, caplog):
    async def broken(*_, **__):
        raise RuntimeError("secret detail of /srv/headrace")

    flows = whole.service
    monkeypatch.setattr(type(flows.embed), "embed", broken)
    monkeypatch.setattr(type(flows.collections), "create", broken)
    client = await whole.client()
    body = {"model": "plain", "input": "x"} if "embeddings" in path else {"name": "x"}
    answer = await client.post(path, json=body, headers={"x-request-id": "abc"})  # and no raise
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "abc"
    assert answer.headers["x-ratelimit-limit-requests"] == "1000"
    assert "abc" in answer.text
    assert "secret" not in answer.text
    assert "RuntimeError" not in answer.text
    shown = answer.json()
    assert shown.get("error", shown)["code"] == "internal_error"
    [logged] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "abc" in logged.getMessage()
    assert logged.exc_info[0] is RuntimeError


async def test_a_fault_after_the_reply_began_is_left_to_the_server(whole):
    whole.app.router.add_route("/broken", _breaks_while_sending)
    with pytest.raises(RuntimeError, match="in the middle"):
        await (await whole.client()).get("/broken")


async def _breaks_while_sending(request):
    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    return answer


async def test_unknown_paths_and_methods(whole):
    client = await whole.client(None)
    for method, path, status, code in (
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/embeddings/", 404, "not_found"),
        ("GET", "/v1/none", 404, "not_found"),
        ("GET", "/v1/embeddings", 405, "method_not_allowed"),
        ("PUT", "/v1/models/plain", 405, "method_not_allowed"),
        ("PATCH", "/v1/collections/books", 405, "method_not_allowed"),
        ("X" * 100, "/v1/collections", 405, "method_not_allowed"),
    ):
        answer = await client.request(method, path)
        assert answer.status_code == status, path
        body = answer.json()
        assert body.get("error", body)["code"] == code
        assert ("error" in body) is path.startswith(("/v1/embeddings", "/v1/models"))
        assert ("allow" in answer.headers) is (status == 405)
        assert body.get("status", status) == status


async def test_a_hostile_host_header_is_no_fault(whole):
    client = await whole.client(None)
    for host in ("[", "a b", "\xff", ""):
        answer = await client.get("/v1/none", headers={"host": host.encode("latin-1")})
        assert answer.status_code == 404


async def test_health_needs_no_key(whole):
    client = await whole.client(None)
    assert (await client.get("/health/live")).json() == {"status": "alive"}
    ready = await client.get("/health/ready")
    assert ready.json() == {"status": "ready", "parts": {"embedder-default": True}}
    whole.embedder.batcher.healthy = False
    sick = await client.get("/health/ready")
    assert (sick.status_code, sick.headers["retry-after"]) == (503, "1")
    assert sick.json() == {"status": "not_ready", "parts": {"embedder-default": False}}


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ({"store": True, "index": True}, "ready", 200),
        ({"store": True, "index": False}, "degraded", 200),
        ({"store": False, "index": False}, "not_ready", 503),
        ({"store": False, "index": True}, "not_ready", 503),
    ],
)
async def test_an_index_that_takes_no_writes_degrades_only(whole, parts, status, code):
    async def ready() -> dict[str, bool]:
        return parts

    object.__setattr__(whole.service, "ready", ready)  # which is frozen
    answer = await (await whole.client(None)).get("/health/ready")
    assert (answer.status_code, answer.json()) == (code, {"status": status, "parts": parts})


def test_the_api_does_not_load_ray_or_torch():
    code = (
        "import sys, serve.api.app; "
        "print([n for n in ('ray', 'torch', 'lancedb', 'pinecone') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

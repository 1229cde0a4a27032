"""deployments.client: what is repeated, how long, and how a refusal reads."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from deployments import client as module
from deployments.client import Client, Problem, Unreachable, ready
from serve.content.documents import Document


class Sleeps(list[float]):
    """A sleep that only writes down."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def client(
    answers: list[httpx.Response | Exception], sleeps: Sleeps, *, patience_s: float = 600
) -> Client:
    """A client whose service gives these answers, the last one for ever."""

    def answer(_request: httpx.Request) -> httpx.Response:
        one = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(one, Exception):
            raise one
        return one

    return Client(
        "http://service",
        "hr_key",
        sleep=sleeps,
        patience_s=patience_s,
        transport=httpx.MockTransport(answer),
    )


def refusal(status: int, **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"code": "word", "detail": "A reason."}, headers=named)


OK = httpx.Response(200, json={"data": []})


def test_it_sends_what_the_service_takes():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return OK

    with Client(
        "http://service", "hr_key", sleep=Sleeps(), transport=httpx.MockTransport(answer)
    ) as one:
        one.write("a b", [Document("id", "text", {"k": 1})], "batch-1")
        one.search("c", "query", 3, {"k": 1})
    assert [str(request.url) for request in seen] == [
        "http://service/v1/collections/a%20b/documents?wait=indexed",
        "http://service/v1/collections/c/search",
    ]
    assert seen[0].headers["authorization"] == "Bearer hr_key"
    assert seen[0].headers["idempotency-key"] == "batch-1"
    assert seen[0].content == b'{"documents":[{"id":"id","text":"text","metadata":{"k":1}}]}'
    assert seen[1].content == b'{"text":"query","top_k":3,"filter":{"k":1}}'


def test_it_waits_as_long_as_it_is_told():
    sleeps = Sleeps()
    answers = [refusal(429, retry_after="2", retry_after_ms="1250"), refusal(503, retry_after="7")]
    assert client([*answers, OK], sleeps).search("c", "q", 1, None) == {"data": []}
    assert sleeps == [1.25, 7]


def test_without_advice_it_backs_off():
    sleeps = Sleeps()
    client([*[refusal(503)] * 8, OK], sleeps).search("c", "q", 1, None)
    assert sleeps == [0.5, 1, 2, 4, 8, 16, 30, 30]


def test_patience_ends():
    sleeps = Sleeps()
    with pytest.raises(Problem) as caught:
        client([refusal(503, retry_after="100")], sleeps).search("c", "q", 1, None)
    assert sleeps == [100] * 6
    assert caught.value.again
    assert caught.value.away


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 504])
def test_other_refusals_are_not_repeated(status):
    sleeps = Sleeps()
    with pytest.raises(Problem) as caught:
        client([refusal(status, retry_after="1")], sleeps).search("c", "q", 1, None)
    assert (sleeps, caught.value.status, caught.value.again) == ([], status, False)


def test_a_quota_that_waiting_cannot_cure_is_not_repeated():
    sleeps = Sleeps()
    with pytest.raises(Problem) as caught:
        client([refusal(429, x_should_retry="false")], sleeps).search("c", "q", 1, None)
    assert (sleeps, caught.value.again) == ([], False)


def test_a_service_that_never_answered_is_unreachable_at_once():
    sleeps = Sleeps()
    with pytest.raises(Unreachable, match="http://service cannot be reached: refused"):
        client([httpx.ConnectError("refused")], sleeps).search("c", "q", 1, None)
    assert sleeps == []


def test_a_service_that_has_answered_may_restart():
    sleeps = Sleeps()
    one = client([OK, httpx.ConnectError("refused"), httpx.ReadError("gone"), OK], sleeps)
    for _ in range(2):
        one.search("c", "q", 1, None)
    assert sleeps == [0.5, 1]


def test_a_service_that_does_not_come_back_is_unreachable():
    sleeps = Sleeps()
    one = client([OK, httpx.ConnectError("refused")], sleeps)
    one.search("c", "q", 1, None)
    with pytest.raises(Unreachable):
        one.search("c", "q", 1, None)
    assert 0 < sum(sleeps) <= module.RESTART_S


def test_an_existing_collection_is_fine():
    one = client([refusal(409), refusal(403)], Sleeps())
    one.ensure_collection("c", None)
    with pytest.raises(Problem):
        one.ensure_collection("c", "m")


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            httpx.Response(
                400, json={"code": "bad", "detail": "No.\n"}, headers={"x-request-id": "r1"}
            ),
            "No. (400 bad, request r1)",
        ),
        (
            httpx.Response(401, json={"error": {"message": "Who?", "code": "invalid_api_key"}}),
            "Who? (401 invalid_api_key, request unknown)",
        ),
        (httpx.Response(400, text="plain\ntext"), "plain text (400 http_error, request unknown)"),
        (httpx.Response(404, text=""), "Not Found (404 http_error, request unknown)"),
    ],
)
def test_a_refusal_is_one_line(answer, line):
    with pytest.raises(Problem) as caught:
        client([answer], Sleeps()).search("c", "q", 1, None)
    assert str(caught.value) == line


def test_another_service_on_the_port_is_said():
    with pytest.raises(Unreachable, match="some other service"):
        client([httpx.Response(200, text="<html>")], Sleeps()).search("c", "q", 1, None)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port of its own, on which nobody answers until a test does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def asked(listener: socket.socket, answer: bytes) -> bool:
    """What `ready` makes of an answer; the question is checked, too."""

    def serve() -> bytes:
        connection, _ = listener.accept()
        with connection:
            question = connection.recv(4096)
            connection.sendall(answer)
        return question

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(serve)
        found = ready(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert served.result().startswith(b"GET /health/ready HTTP/1.1\r\n")
    return found


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"", False),
    ],
)
def test_ready(listener, answer, expected):
    assert asked(listener, answer) is expected


def test_not_ready_while_nothing_listens(listener):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    assert not ready(url)

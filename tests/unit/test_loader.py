"""deployments.loader: every document gets an outcome."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from deployments.client import Problem, Unreachable
from deployments.loader import ROUNDS_MAX, Loader, batches
from serve.content.documents import Document


def docs(*names: str) -> list[Document]:
    return [Document(name, f"text of {name}") for name in names]


def refused(status: int, **headers: str) -> Problem:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"code": "word", "detail": "A reason."}
    return Problem(httpx.Response(status, json=body, headers=named))


def indexed(name: str) -> dict[str, Any]:
    return {"id": name, "status": "indexed", "generation": 1, "chunks": 2}


def failed(name: str, status: int) -> dict[str, Any]:
    error = {"status": status, "code": "word", "detail": "A reason."}
    return {"id": name, "status": "failed", "generation": 1, "chunks": 0, "error": error}


class Service:
    """A client whose `write` gives what `decide` says for one document, or raises it."""

    def __init__(self, decide: Callable[[list[str]], Any]) -> None:
        self.decide = decide
        self.calls: list[list[str]] = []
        self.pauses: list[float] = []

    def write(self, collection: str, documents: Sequence[Document]) -> dict[str, Any]:
        names = [one.id for one in documents]
        self.calls.append(names)
        decided = self.decide(names)
        if isinstance(decided, Exception):
            raise decided
        return {"data": decided, "usage": {"total_tokens": 10 * len(names)}}

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def loader(decide: Callable[[list[str]], Any]) -> tuple[Loader, Service]:
    service = Service(decide)
    return Loader(service, "c"), service  # type: ignore[arg-type]


def test_batches_are_bounded_by_count_and_bytes():
    found = batches([Document(str(size), "é" * size) for size in (1, 1, 1, 9, 1, 2)], 2, 6)
    assert [[one.id for one in batch] for batch in found] == [["1", "1"], ["1"], ["9"], ["1", "2"]]


def test_all_is_well():
    one, _ = loader(lambda names: [indexed(name) for name in names])
    heard: list[int] = []
    summary = one.load([docs("a", "b"), docs("c"), docs("d")], heard.append)
    assert (summary.indexed, summary.chunks, summary.tokens) == (4, 8, 40)
    assert (summary.failed, summary.stopped, sorted(heard)) == ([], None, [1, 1, 2])


def test_a_superseded_document_is_not_lost():
    one, _ = loader(lambda names: [indexed(name) | {"status": "superseded"} for name in names])
    assert one.land(docs("a")).indexed == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_the_document_at_fault_is_found_and_the_others_are_written(status):
    one, service = loader(
        lambda names: refused(status) if "bad" in names else [indexed(name) for name in names]
    )
    summary = one.land(docs("a", "b", "bad", "c", "d", "e"))
    assert summary.indexed == 5
    assert summary.failed == [("bad", f"A reason. ({status} word, request unknown)")]
    assert service.pauses == []


def test_a_request_above_the_quota_is_halved():
    one, service = loader(
        lambda names: (
            refused(429, x_should_retry="false")
            if len(names) > 2
            else [indexed(name) for name in names]
        )
    )
    assert one.land(docs("a", "b", "c", "d")).indexed == 4
    assert service.calls[1:] == [["a", "b"], ["c", "d"]]


def test_documents_with_a_passing_fault_are_sent_again():
    tries: dict[str, int] = {}

    def decide(names: list[str]) -> list[dict[str, Any]]:
        for name in names:
            tries[name] = tries.get(name, 0) + 1
        return [
            failed(name, 503) if name == "b" and tries[name] < 3 else indexed(name)
            for name in names
        ]

    one, service = loader(decide)
    summary = one.land(docs("a", "b", "c"))
    assert (summary.indexed, summary.failed) == (3, [])
    assert service.calls == [["a", "b", "c"], ["b"], ["b"]]
    assert service.pauses == [1, 2]


def test_documents_are_not_sent_again_for_ever():
    one, service = loader(lambda names: [failed(name, 503) for name in names])
    assert one.land(docs("a")).failed == [("a", "A reason. (word)")]
    assert len(service.calls) == 1 + ROUNDS_MAX


def test_a_document_refused_for_good_is_sent_once():
    one, service = loader(lambda names: [failed(name, 422) for name in names])
    assert one.land(docs("a")).failed == [("a", "A reason. (word)")]
    assert len(service.calls) == 1


def test_a_slow_request_is_halved_a_bounded_number_of_times():
    one, service = loader(lambda names: refused(504))
    summary = one.land(docs(*"abcdefghijklmnop"))
    assert len(summary.failed) == 16
    assert len(service.calls) == 1 + 2 + 4 + 8


def test_a_fault_of_the_service_is_tried_again_as_a_whole():
    answers = [refused(500), refused(500)]
    one, service = loader(
        lambda names: answers.pop() if answers else [indexed(name) for name in names]
    )
    assert one.land(docs("a", "b")).indexed == 2
    assert (len(service.calls), service.pauses) == (3, [1, 2])


@pytest.mark.parametrize(
    "error",
    [refused(401), refused(404), refused(503, retry_after="1"), Unreachable("gone")],
    ids=["key", "collection", "full for too long", "gone"],
)
def test_what_no_batch_can_pass_ends_it(error):
    one, service = loader(lambda names: [indexed("a")] if names == ["a"] else error)
    summary = one.load((docs(name) for name in "abcdefgh"), lambda _count: None)
    assert summary.stopped is error
    assert summary.seen == summary.indexed == 1
    assert len(service.calls) <= 4


def test_an_interrupt_finishes_what_is_in_flight():
    def work():
        yield docs("a")
        raise KeyboardInterrupt

    one, _ = loader(lambda names: [indexed(name) for name in names])
    summary = one.load(work(), lambda _count: None)
    assert summary.indexed == 1
    assert isinstance(summary.stopped, KeyboardInterrupt)

"""deployments.loader: every document gets an outcome."""

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from deployments.client import Problem, Unreachable
from deployments.loader import FOLLOWS_MAX, REQUESTS_MAX, ROUNDS_MAX, Loader, batches
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


def accepted(names: list[str], **statuses: str) -> dict[str, Any]:
    """A receipt for a job that goes on; `statuses` of what is known already."""
    data = [{"id": name, "status": statuses.get(name, "accepted"), "chunks": 2} for name in names]
    return {"object": "receipt", "job": "job_7", "level": "accepted", "data": data}


class Service:
    """A client whose `write` gives what `decide` says for one document, or raises it."""

    def __init__(self, decide: Callable[[list[str]], Any]) -> None:
        self.decide = decide
        self.calls: list[list[str]] = []
        self.keys: list[str] = []
        self.pauses: list[float] = []

    def write(self, collection: str, documents: Sequence[Document], key: str) -> dict[str, Any]:
        names = [one.id for one in documents]
        self.calls.append(names)
        self.keys.append(key)
        decided = self.decide(names)
        if isinstance(decided, Exception):
            raise decided
        if isinstance(decided, dict):
            return decided
        return {"object": "list", "data": decided, "usage": {"total_tokens": 10 * len(names)}}

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


def test_a_job_is_followed_to_its_end_by_the_same_request():
    answers: list[Any] = [accepted(["a", "b"]), accepted(["a", "b"], a="indexed")]
    one, service = loader(
        lambda names: answers.pop(0) if answers else [indexed(name) for name in names]
    )
    assert one.land(docs("a", "b")).indexed == 2
    assert service.calls == [["a", "b"]] * 3
    assert len(set(service.keys)) == 1
    assert one.land(docs("c")).indexed == 1
    assert len(set(service.keys)) == 2


def test_a_job_is_not_followed_for_ever():
    one, service = loader(lambda names: accepted(names, a="indexed"))
    summary = one.land(docs("a", "b"))
    assert (summary.indexed, summary.chunks) == (1, 2)
    assert summary.failed == [("b", "accepted, but not indexed yet: job job_7 goes on")]
    assert len(service.calls) == 1 + FOLLOWS_MAX


def test_a_receipt_that_knows_of_no_document_is_an_outcome():
    one, _ = loader(lambda names: {"object": "receipt", "job": "job_7", "level": "accepted"})
    assert [name for name, _ in one.land(docs("a", "b")).failed] == ["a", "b"]


def test_what_was_there_before_is_counted():
    one, _ = loader(
        lambda names: [
            indexed(name) | ({"status": "unchanged", "chunks": 0} if name == "a" else {})
            for name in names
        ]
    )
    summary = one.land(docs("a", "b"))
    assert (summary.indexed, summary.unchanged, summary.chunks) == (2, 1, 2)


def test_a_cancelled_document_failed():
    one, _ = loader(lambda names: [indexed(name) | {"status": "cancelled"} for name in names])
    assert one.land(docs("a")).failed == [("a", "its job was cancelled")]


def test_a_document_refused_for_good_is_sent_once():
    one, service = loader(lambda names: [failed(name, 422) for name in names])
    assert one.land(docs("a")).failed == [("a", "A reason. (word)")]
    assert len(service.calls) == 1


def test_a_fault_of_the_service_is_tried_again_as_a_whole():
    answers = [refused(500), refused(500)]
    one, service = loader(
        lambda names: answers.pop() if answers else [indexed(name) for name in names]
    )
    assert one.land(docs("a", "b")).indexed == 2
    assert (len(service.calls), service.pauses) == (3, [1, 2])


def test_a_fault_of_the_service_is_not_tried_for_ever():
    one, service = loader(lambda names: refused(500))
    summary = one.land(docs("a", "b"))
    assert [name for name, _ in summary.failed] == ["a", "b"]
    assert len(service.calls) == 1 + ROUNDS_MAX


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
    assert len(service.calls) <= 2 * REQUESTS_MAX


def test_an_interrupt_finishes_what_is_in_flight():
    def work():
        yield docs("a")
        raise KeyboardInterrupt

    one, _ = loader(lambda names: [indexed(name) for name in names])
    summary = one.load(work(), lambda _count: None)
    assert summary.indexed == 1
    assert isinstance(summary.stopped, KeyboardInterrupt)


def test_an_interrupt_ends_the_waiting():
    def work():
        yield docs("a")
        raise KeyboardInterrupt

    def decide(names: list[str]) -> dict[str, Any]:
        one._interrupted.wait()
        return accepted(names)

    one, service = loader(decide)
    summary = one.load(work(), lambda _count: None)
    assert summary.failed == [("a", "accepted, but not indexed yet: job job_7 goes on")]
    assert len(service.calls) == 1

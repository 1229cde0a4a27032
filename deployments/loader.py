"""Sends documents in batches and accounts for every one of them.

The service accepts each batch as a job of its own. It is followed to its end, by repeating the
request with its idempotency key, so that a lost reply or a restart of the service writes nothing
twice and loses nothing.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from deployments.client import Client, Problem, Unreachable
from serve.content.documents import Document


BATCH_BYTES_MAX = 256 * 1024
"""Text of one request: about 64,000 tokens, which a small CPU embeds well within a deadline."""

REQUESTS_MAX = 4
"""Open jobs: while one is embedded, others are cut and land."""

ROUNDS_MAX = 3
"""How often documents are sent again after a fault of the service."""

FOLLOWS_MAX = 30
"""How often a job is waited for, about an hour by the service's own deadline of 120 s."""

FOLLOW_PAUSE_S = 1.0
"""Before that is done again: a service in trouble answers at once."""

DIVIDED = frozenset({400, 413, 422, 429})
"""The request as a whole was refused: halves may pass, down to the one document at fault."""

TRANSIENT = frozenset({408, 500, 504})

NOT_WRITTEN = frozenset({"accepted", "cancelled"})

FATAL = frozenset({401, 403, 404})
"""No other batch would fare better."""


@dataclass(slots=True)
class Summary:
    """What became of the documents: `failed` pairs ids with reasons; `stopped` ended it early.

    `unchanged` ones were in the index before, and count as indexed.
    """

    indexed: int = 0
    unchanged: int = 0
    chunks: int = 0
    tokens: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    stopped: Problem | Unreachable | KeyboardInterrupt | None = None

    def add(self, other: "Summary") -> None:
        """Take in another's counts."""
        self.indexed += other.indexed
        self.unchanged += other.unchanged
        self.chunks += other.chunks
        self.tokens += other.tokens
        self.failed += other.failed

    @property
    def seen(self) -> int:
        """Documents that have an outcome."""
        return self.indexed + len(self.failed)


def batches(
    documents: Iterable[Document], count_max: int, bytes_max: int = BATCH_BYTES_MAX
) -> Iterator[list[Document]]:
    """Consecutive documents of at most `bytes_max` of text; a larger one goes alone."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        weight = len(document.text.encode())
        if batch and (len(batch) == count_max or size + weight > bytes_max):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += weight
    if batch:
        yield batch


class Loader:
    """Writes into one collection."""

    def __init__(self, client: Client, collection: str) -> None:
        self._client = client
        self._collection = collection
        self._interrupted = threading.Event()

    def load(self, work: Iterable[Sequence[Document]], advance: Callable[[int], object]) -> Summary:
        """Send all batches, a few at once. `advance` hears how many documents got an outcome.

        Ends early, with `stopped` set, when no batch can pass or on Ctrl-C; the requests in
        flight are finished then, so that the summary knows of all that was accepted.
        """
        summary = Summary()
        waiting: set[Future[Summary]] = set()
        with ThreadPoolExecutor(REQUESTS_MAX, "ingest") as pool:
            try:
                for batch in work:
                    if len(waiting) == REQUESTS_MAX:
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                        _collect(done, summary, advance)
                    if summary.stopped is not None:
                        break
                    waiting.add(pool.submit(self.land, batch))
                wait(waiting)
            except KeyboardInterrupt as interrupt:
                summary.stopped = interrupt
                self._interrupted.set()
        _collect(waiting, summary, advance)
        return summary

    def land(self, documents: Sequence[Document], round_number: int = 0) -> Summary:
        """Write one batch and wait for its end.

        Raises Unreachable, and Problem when no other batch would fare better.
        """
        try:
            answer = self._followed(documents)
        except Problem as problem:
            if problem.status in FATAL or problem.again:
                raise
            return self._after_refusal(documents, problem, round_number)
        return _outcomes(documents, answer)

    def _followed(self, documents: Sequence[Document]) -> Mapping[str, Any]:
        """The answer to a batch: in the end all its documents have an outcome."""
        key = uuid.uuid4().hex
        answer = self._client.write(self._collection, documents, key)
        for _ in range(FOLLOWS_MAX):
            if answer["object"] != "receipt" or self._interrupted.is_set():
                break
            self._client.pause(FOLLOW_PAUSE_S)
            answer = self._client.write(self._collection, documents, key)
        return answer

    def _after_refusal(
        self, documents: Sequence[Document], problem: Problem, round_number: int
    ) -> Summary:
        if len(documents) > 1 and problem.status in DIVIDED:
            middle = len(documents) // 2
            both = self.land(documents[:middle], round_number)
            both.add(self.land(documents[middle:], round_number))
            return both
        if problem.status in TRANSIENT and round_number < ROUNDS_MAX:
            self._client.pause(2.0**round_number)
            return self.land(documents, round_number + 1)
        return Summary(failed=[(one.id, str(problem)) for one in documents])


def _outcomes(documents: Sequence[Document], answer: Mapping[str, Any]) -> Summary:
    """What the answer to a batch says of each of its documents."""
    if answer["object"] == "receipt":
        known = answer.get("data") or [{"status": "accepted"}] * len(documents)
        tokens, goes_on = 0, f"accepted, but not indexed yet: job {answer['job']} goes on"
    else:
        known, tokens, goes_on = answer["data"], int(answer["usage"]["total_tokens"]), ""
    summary = Summary(tokens=tokens)
    for document, result in zip(documents, known, strict=True):
        status, error = result["status"], result.get("error")
        if error is not None:
            summary.failed.append((document.id, f"{error['detail']} ({error['code']})"))
        elif status in NOT_WRITTEN:
            summary.failed.append((document.id, goes_on or "its job was cancelled"))
        else:  # also superseded, by a newer write
            summary.indexed += 1
            summary.unchanged += status == "unchanged"
            summary.chunks += int(result["chunks"])
    return summary


def _collect(
    done: Iterable[Future[Summary]], summary: Summary, advance: Callable[[int], object]
) -> None:
    for future in done:
        try:
            part = future.result()
        except (Problem, Unreachable) as failure:
            summary.stopped = summary.stopped or failure
        else:
            summary.add(part)
            advance(part.seen)

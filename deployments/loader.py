"""Sends documents in batches and accounts for every one of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from deployments.client import Client, Problem, Unreachable
from serve.content.documents import Document


BATCH_BYTES_MAX = 256 * 1024
"""Text of one request: about 64,000 tokens, which a small CPU embeds well within a deadline."""

REQUESTS_MAX = 2
"""At once: while one is embedded, the service cuts and tokenises the other."""

ROUNDS_MAX = 3
"""How often documents are sent again after a transient fault of their own."""

DIVIDED = frozenset({400, 413, 422, 429})
"""The request as a whole was refused: halves may pass, down to the one document at fault."""

SLOW = frozenset({408, 504})
"""The request took too long: halves may be quicker, but each try spends a round."""

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})

FATAL = frozenset({401, 403, 404})
"""No other batch would fare better."""


@dataclass(slots=True)
class Summary:
    """What became of the documents: `failed` pairs ids with reasons; `stopped` ended it early."""

    indexed: int = 0
    chunks: int = 0
    tokens: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    stopped: Problem | Unreachable | KeyboardInterrupt | None = None

    def add(self, other: "Summary") -> None:
        """Take in another's counts."""
        self.indexed += other.indexed
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

    def load(self, work: Iterable[Sequence[Document]], advance: Callable[[int], object]) -> Summary:
        """Send all batches, a few at once. `advance` hears how many documents got an outcome.

        Ends early, with `stopped` set, when no batch can pass or on Ctrl-C; the requests in
        flight are finished then, so that what the summary says is what was written.
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
        _collect(waiting, summary, advance)
        return summary

    def land(self, documents: Sequence[Document], round_number: int = 0) -> Summary:
        """Write one batch; documents that fail for a passing reason are sent again.

        Raises Unreachable, and Problem when no other batch would fare better.
        """
        try:
            answer = self._client.write(self._collection, documents)
        except Problem as problem:
            if problem.status in FATAL or problem.again:
                raise
            return self._after_refusal(documents, problem, round_number)
        return self._after_answer(documents, answer, round_number)

    def _after_refusal(
        self, documents: Sequence[Document], problem: Problem, round_number: int
    ) -> Summary:
        slow = problem.status in SLOW
        last = round_number >= ROUNDS_MAX
        if len(documents) > 1 and (problem.status in DIVIDED or (slow and not last)):
            middle = len(documents) // 2
            both = self.land(documents[:middle], round_number + slow)
            both.add(self.land(documents[middle:], round_number + slow))
            return both
        if problem.status in TRANSIENT and problem.status not in DIVIDED and not last:
            return self._again(documents, round_number)
        return Summary(failed=[(one.id, str(problem)) for one in documents])

    def _after_answer(
        self, documents: Sequence[Document], answer: Mapping[str, Any], round_number: int
    ) -> Summary:
        summary = Summary(tokens=int(answer["usage"]["total_tokens"]))
        repeats: list[Document] = []
        for document, result in zip(documents, answer["data"], strict=True):
            error = result.get("error")
            if result["status"] != "failed":  # indexed, or superseded by a newer write
                summary.indexed += 1
                summary.chunks += int(result["chunks"])
            elif error["status"] in TRANSIENT and round_number < ROUNDS_MAX:
                repeats.append(document)
            else:
                summary.failed.append((document.id, f"{error['detail']} ({error['code']})"))
        if repeats:
            summary.add(self._again(repeats, round_number))
        return summary

    def _again(self, documents: Sequence[Document], round_number: int) -> Summary:
        self._client.pause(2.0**round_number)
        return self.land(documents, round_number + 1)


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

"""`POST /v1/embeddings`: tokenise -> quota -> what is at hand -> embedder -> vectors in input order."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from serve import tracing
from serve.canary import Arm
from serve.embedding.quantise import BITS, Dtype
from serve.errors import BadInput, PoisonInput, ServiceError
from serve.flows.canaries import Answer, Canaries, Question
from serve.flows.context import Context, Timing, left, within
from serve.flows.models import Served
from serve.flows.reuse import Rank, Reuse
from serve.records import Caller, EmbedCall, EmbedReply, Input, Klass, TokenIds, Vector


TruncateSide = Literal["NONE", "START", "END"]

SHORT_UNITS = 500
"""Characters or token ids of a request that is tokenised at once: at most 0.2 ms."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """What a caller wants: either `texts` or `ids` is set.

    `truncate` says which side of too long an input may go: NONE refuses it instead. `dtype` is what the
    vectors are written as in the end. `param` is what an error calls an input, by its index.
    """

    model: str
    texts: Sequence[str] | None = None
    ids: Sequence[Sequence[int]] | None = None
    dimensions: int | None = None
    truncate: TruncateSide = "NONE"
    dtype: Dtype = "float"
    param: str = "input[{}]"


@dataclass(frozen=True, slots=True)
class Cut:
    """An input that was truncated at the caller's wish."""

    index: int
    tokens: int
    used: int


@dataclass(frozen=True, slots=True)
class Embedded:
    """Unit vectors, float32 (inputs, dimensions); `tokens` is what was used and is paid for.

    `cached` inputs needed no model. `revision` is of the model that answered, and `arm` says which of a canary's
    two that was, if there is one.
    """

    vectors: Vector
    tokens: int
    timing: Timing
    cuts: tuple[Cut, ...] = ()
    cached: int = 0
    revision: str = ""
    arm: Arm | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """Work for the embedder on behalf of a caller.

    It may wait `deadline_s` for others, unless the client itself said `until` when, on the
    context's clock, it wants the answer. `priority` orders the caller's own work of the class.
    """

    caller: Caller
    request_id: str
    klass: Klass
    deadline_s: float
    until: float | None = None
    priority: int = 0

    @property
    def rank(self) -> Rank:
        """Of all work that is done at the same pace."""
        return self.caller.tenant, self.klass, self.priority


class EmbedFlow:
    """Embeds texts and token ids; the other flows embed through it as well.

    `reuse` holds what need not be computed again, at most `kept_bytes_max` of it; it is None where the
    settings say that every input is computed. `canaries` have a say in `embed` only: what is searched for or
    lands in a collection is of the collection's model.
    """

    def __init__(
        self, context: Context, *, kept_bytes_max: int = 0, canaries: Canaries | None = None
    ) -> None:
        self._canaries = canaries
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self.reuse = (
            Reuse(context.settings.cache, bytes_max=kept_bytes_max, clock=context.clock)
            if context.settings.cache.scope != "none"
            else None
        )

    async def embed(
        self,
        caller: Caller,
        request: EmbedRequest,
        request_id: str,
        *,
        until: float | None = None,
    ) -> Embedded:
        """Embed one request at class `interactive`.

        Raises NotFound (model), BadInput (names the input), QuotaExceeded, DeadlineExceeded, and
        what `ports.Embedder.embed` raises. An input that fails alone fails the request, by index.
        """
        served = self._models.find(request.model)
        size = size_of(served, request)
        deadline_s = self._settings.limits.interactive_deadline_s
        work = Work(caller, request_id, "interactive", deadline_s, until)
        admitted = partial(self._quotas.admitted, caller, "interactive", model=served.model.id)
        async with within(until, self._clock), admitted(tokens=0):  # tokenising is work, too
            began = self._clock()
            with tracing.part("headrace.tokenise"):
                ids, cuts = await self.tokenise(served, request)
            tokenise_ms = (self._clock() - began) * 1e3
            tokens = sum(len(row) for row in ids)
            async with admitted(tokens=tokens, requests=0):
                answer = await self._answer(work, served, request, ids)
                reply = answer.reply
                if reply.failures:  # inside: a fault of ours is refunded
                    index, failure = reply.failures[0]
                    raise named(failure, request.param.format(index))
        timing = Timing(tokenise_ms, reply.queue_ms, reply.infer_ms)
        return Embedded(
            cut(reply.vectors, size),
            tokens,
            timing,
            cuts,
            reply.cached,
            answer.by.revision,
            answer.arm,
        )

    async def _answer(
        self, work: Work, served: Served, request: EmbedRequest, ids: Sequence[TokenIds]
    ) -> Answer:
        """By the model that was asked for, or by a canary of it."""
        if self._canaries is None:
            return Answer(await self.run(work, served, ids), served)

        async def ask(by: Served, until: float | None) -> EmbedReply:
            return await self.run(replace(work, until=until), by, ids)

        question = Question(work.caller, work.request_id, request.texts, ids, work.until)
        return await self._canaries.answer(served, question, ask)

    async def tokenise(
        self, served: Served, request: EmbedRequest
    ) -> tuple[list[TokenIds], tuple[Cut, ...]]:
        """Token ids of every input, in a thread unless they are short; too long ones are refused or cut.

        Raises BadInput naming the input, or `input` when the request as a whole is too long.
        """
        if _is_short(request):
            rows = _token_rows(served, request)
        else:
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(self._threads, _token_rows, served, request)
        cuts: list[Cut] = []
        for index, row in enumerate(rows):
            if len(row) <= served.tokens_max:
                continue
            if request.truncate == "NONE":
                param = request.param.format(index)
                raise BadInput(
                    f"{param} has {len(row)} tokens; the model {served.model.id} takes at most "
                    f"{served.tokens_max}.",
                    param=param,
                    code="context_length_exceeded",
                )
            rows[index] = served.tokenizer.truncate(row, served.tokens_max, request.truncate)
            cuts.append(Cut(index, len(row), len(rows[index])))
        total = sum(len(row) for row in rows)
        limit = self._settings.limits.request_tokens_max
        if total > limit:
            raise BadInput(
                f"The request has {total} tokens over all inputs; at most {limit} are allowed.",
                param="input",
                code="max_tokens_per_request",
            )
        return rows, tuple(cuts)

    async def run(self, work: Work, served: Served, ids: Sequence[TokenIds]) -> EmbedReply:
        """Embed token ids: equal ones once, and none whose vector is at hand or under way.

        Raises DeadlineExceeded before any call once `work.until` has passed.
        """

        async def ask(rows: Sequence[TokenIds], deadline_s: float) -> EmbedReply:
            return await served.embedder.embed(self._call(work, served, rows, deadline_s))

        reuse = self.reuse
        if reuse is None:
            return await self._in_parts(
                ids, lambda start, stop: ask(ids[start:stop], work.deadline_s)
            )
        lot = reuse.lot(work.caller.tenant, served, ids)
        if not lot.rows:
            return lot.filled(EmbedReply(np.empty((0, served.model.dimensions), np.float32)))
        keys, rows = lot.keys, lot.rows

        async def once(start: int, stop: int) -> EmbedReply:
            part = slice(start, stop)
            wait_s = work.deadline_s if work.until is None else left(work.until, self._clock)
            return await reuse.once(work.rank, keys[part], rows[part], ask, deadline_s=wait_s)

        return lot.filled(await self._in_parts(rows, once))

    async def _in_parts(
        self, ids: Sequence[TokenIds], act: Callable[[int, int], Awaitable[EmbedReply]]
    ) -> EmbedReply:
        """Act on all of them or, above `slice_tokens`, on several ranges at once."""
        parts = _parts([len(row) for row in ids], self._settings.ingress.slice_tokens)
        if len(parts) == 1:
            return await act(*parts[0])
        gate = asyncio.Semaphore(self._settings.ingress.slices_in_flight_max)

        async def one(start: int, stop: int) -> EmbedReply:
            async with gate:
                return await act(start, stop)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*part)) for part in parts]
        except ExceptionGroup as errors:  # the first failure; the other calls were cancelled
            raise errors.exceptions[0] from None
        return _joined([task.result() for task in tasks], [start for start, _ in parts])

    def _call(
        self, work: Work, served: Served, ids: Sequence[TokenIds], deadline_s: float
    ) -> EmbedCall:
        caller = work.caller
        limit_s = None if work.until is None else left(work.until, self._clock)
        return EmbedCall(
            request_id=work.request_id,
            tenant=caller.tenant,
            weight=caller.weight,
            klass=work.klass,
            model=served.model.id,
            inputs=tuple(Input(ids=row) for row in ids),
            tokens=tuple(len(row) for row in ids),
            deadline_s=deadline_s if limit_s is None else limit_s,
            limit_s=limit_s,
            priority=work.priority,
            tier=caller.tier,
            trace=tracing.carrier(),
        )


def _is_short(request: EmbedRequest) -> bool:
    """Whether tokenising takes less than handing it to a thread would: 0.25 ms of CPU."""
    inputs = request.texts if request.texts is not None else request.ids or ()
    return len(inputs) <= SHORT_UNITS and sum(map(len, inputs)) <= SHORT_UNITS


def _token_rows(served: Served, request: EmbedRequest) -> list[TokenIds]:
    if request.texts is not None:
        return served.tokenizer.encode(request.texts)
    rows: list[TokenIds] = []
    for index, row in enumerate(request.ids or ()):
        try:
            rows.append(served.tokenizer.accept_ids(row))
        except BadInput as error:
            raise named(error, request.param.format(index)) from None
    return rows


def size_of(served: Served, request: EmbedRequest) -> int:
    """The length to cut vectors to. Raises BadInput when the model cannot, or `dtype` cannot hold it."""
    own, wanted = served.model.dimensions, request.dimensions
    size = own if wanted is None else wanted
    if size != own and not served.model.matryoshka:
        raise BadInput(
            f"The model {served.model.id} has {own} dimensions and was not trained to be cut.",
            param="dimensions",
            code="dimensions_not_supported",
        )
    if not 1 <= size <= own:
        raise BadInput(f"dimensions must be between 1 and {own}.", param="dimensions")
    if request.dtype in BITS and size % 8:
        raise BadInput(
            f"{request.dtype} packs 8 dimensions into a byte, and {size} is no multiple of 8.",
            param="output_dtype",
        )
    return size


def cut(vectors: Vector, size: int) -> Vector:
    """Matryoshka: the first `size` dimensions, of unit length again (in float32)."""
    if vectors.shape[1] == size:
        return vectors
    head = np.ascontiguousarray(vectors[:, :size], np.float32)
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    if not bool(np.all(norms > 0)):
        raise PoisonInput("A vector is zero in the dimensions asked for.", param="dimensions")
    cut: Vector = head / norms
    return cut


def _parts(tokens: Sequence[int], slice_tokens: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `slice_tokens` each (one input may exceed it, alone)."""
    parts: list[tuple[int, int]] = []
    start, room = 0, slice_tokens
    for index, count in enumerate(tokens):
        if index > start and count > room:
            parts.append((start, index))
            start, room = index, slice_tokens
        room -= count
    return [*parts, (start, len(tokens))]


def _joined(replies: Sequence[EmbedReply], starts: Sequence[int]) -> EmbedReply:
    """The replies of consecutive ranges as one."""
    return EmbedReply(
        np.concatenate([reply.vectors for reply in replies]),
        tuple(
            (start + index, failure)
            for start, reply in zip(starts, replies, strict=True)
            for index, failure in reply.failures
        ),
        queue_ms=max(reply.queue_ms for reply in replies),
        infer_ms=max(reply.infer_ms for reply in replies),
    )


def named(failure: ServiceError, param: str) -> ServiceError:
    """The failure of one input as the failure of the request, naming the input."""
    return type(failure)(
        f"{param}: {failure.message}",
        param=param,
        code=failure.code,
        retry_after_s=failure.retry_after_s,
    )

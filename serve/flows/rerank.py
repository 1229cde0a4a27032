"""`POST /v1/rerank`, and what reranks a search: how well each text answers a query, read together.

A pair is one input of token ids: it is admitted, queued, packed and reused as texts to embed are.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from serve.errors import BadInput
from serve.flows.context import Context, Timing, within
from serve.flows.embed import Cut, EmbedFlow, Work, named
from serve.flows.models import Served
from serve.records import Caller, TokenIds


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Texts to score against a query.

    `truncate`: whether too long a text may lose its END; NONE refuses it. The query is never cut.
    `query_param` and `param` are what errors call the query, and a text by its index.
    """

    query: str
    texts: Sequence[str]
    model: str | None = None
    truncate: Literal["NONE", "END"] = "NONE"
    query_param: str = "query"
    param: str = "documents[{}]"


@dataclass(frozen=True, slots=True)
class Scored:
    """A score from 0 to 1 of each text, in their order; `tokens` are those of all pairs."""

    model: str
    scores: Sequence[float]
    tokens: int
    timing: Timing
    cuts: tuple[Cut, ...] = ()

    def best(self, most: int) -> list[int]:
        """Indices of texts, best first; ties in their own order."""
        order = sorted(range(len(self.scores)), key=lambda index: -self.scores[index])
        return order[:most]


class RerankFlow:
    """Scores texts through the embedders that hold a reranker."""

    def __init__(self, context: Context, embed: EmbedFlow) -> None:
        self._settings = context.settings
        self._models = context.models
        self._quotas = context.quotas
        self._threads = context.threads
        self._clock = context.clock
        self._embed = embed

    async def rerank(
        self,
        caller: Caller,
        request: RerankRequest,
        request_id: str,
        *,
        until: float | None = None,
    ) -> Scored:
        """Score one request at class `interactive`.

        Raises NotFound (model), BadInput, QuotaExceeded, DeadlineExceeded, and what
        `ports.Embedder.embed` raises. A pair that fails alone fails the request, by index.
        """
        served = self.find(request.model)
        limits = self._settings.limits
        if len(request.texts) > limits.rerank_documents_max:
            raise BadInput(
                f"At most {limits.rerank_documents_max} documents, not {len(request.texts)}.",
                param="documents",
            )
        work = Work(caller, request_id, "interactive", limits.interactive_deadline_s, until)
        model = served.model.id
        admitted = self._quotas.admitted(caller, "interactive", tokens=0, model=model)
        async with within(until, self._clock), admitted:  # tokenising is work, too
            return await self.score(work, served, request)

    def find(self, model: str | None, *, param: str = "model") -> Served:
        """The reranker of that id, or the first. Raises NotFound."""
        if model is None:
            return self._models.first("reranker", param=param)
        return self._models.find(model, param=param, kind="reranker")

    async def score(self, work: Work, served: Served, request: RerankRequest) -> Scored:
        """As part of a request that was admitted; the tokens are charged here.

        Raises as `rerank` does.
        """
        began = self._clock()
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(
            self._threads, partial(served.tokenizer.encode_pairs, request.query, request.texts)
        )
        ids, cuts = self._fitting(served, request, rows)
        tokenise_ms = (self._clock() - began) * 1e3
        tokens = sum(len(row) for row in ids)
        if tokens > (most := self._settings.limits.request_tokens_max):
            raise BadInput(
                f"The request has {tokens} tokens over all pairs; at most {most} are allowed.",
                param=request.param.partition("[")[0],
                code="max_tokens_per_request",
            )
        admitted = self._quotas.admitted(
            work.caller, work.klass, tokens=tokens, requests=0, model=served.model.id
        )
        async with admitted:
            reply = await self._embed.run(work, served, ids)
            if reply.failures:  # inside: a fault of ours is refunded
                index, failure = reply.failures[0]
                raise named(failure, request.param.format(index))
        timing = Timing(tokenise_ms, reply.queue_ms, reply.infer_ms)
        return Scored(served.model.id, reply.vectors[:, 0].tolist(), tokens, timing, cuts)

    def _fitting(
        self, served: Served, request: RerankRequest, rows: Sequence[TokenIds]
    ) -> tuple[list[TokenIds], tuple[Cut, ...]]:
        """What the model can read of each pair. Raises BadInput where that is not allowed."""
        most = served.tokens_max
        if all(len(row) <= most for row in rows):
            return list(rows), ()
        [bare] = served.tokenizer.encode_pairs(request.query, [""])
        if len(bare) >= most:
            raise BadInput(
                f"{request.query_param} has {len(bare)} tokens with those around it; the model "
                f"{served.model.id} takes fewer than {most}, so that a text has room.",
                param=request.query_param,
                code="context_length_exceeded",
            )
        cuts = []
        for index, row in enumerate(rows):
            if len(row) > most:
                if request.truncate == "NONE":
                    param = request.param.format(index)
                    raise BadInput(
                        f"{param} has {len(row)} tokens with the query; the model "
                        f"{served.model.id} takes at most {most}.",
                        param=param,
                        code="context_length_exceeded",
                    )
                cuts.append(Cut(index, len(row), most))
        return [served.tokenizer.cut_pair(row, most) for row in rows], tuple(cuts)

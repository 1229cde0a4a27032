"""What the routes need of one ingress replica, and how they reach it.

The dependencies are coroutines, because a plain function would cost each request a trip to a thread
(0.4 ms), and a route has one of them, because FastAPI takes 50 us for each.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from serve.admission.keys import Door, parse, require_admin
from serve.api.wire import refuse_nul
from serve.errors import BadInput
from serve.flows.batch import BatchFlow
from serve.flows.canaries import Canaries
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context, Timing
from serve.flows.embed import EmbedFlow
from serve.flows.erasure import EraseFlow
from serve.flows.exports import ExportFlow
from serve.flows.feed import Feed
from serve.flows.files import FileFlow
from serve.flows.ingest import IngestFlow
from serve.flows.jobs import JobFlow
from serve.flows.operators import OperatorFlow
from serve.flows.queues import QueueFlow
from serve.flows.receipts import ReceiptFlow
from serve.flows.rerank import RerankFlow
from serve.flows.scalings import ScalingFlow
from serve.flows.search import SearchFlow
from serve.flows.streams import Streams
from serve.flows.usage import UsageFlow
from serve.flows.vectors import VectorFlow
from serve.flows.webhooks import WebhookFlow
from serve.records import Caller


@dataclass(frozen=True, slots=True)
class Service:
    """Everything behind the routes. `ready` answers part by part: name -> usable."""

    context: Context
    door: Door
    embed: EmbedFlow
    collections: CollectionFlow
    ingest: IngestFlow
    receipts: ReceiptFlow
    search: SearchFlow
    rerank: RerankFlow
    vectors: VectorFlow
    queues: QueueFlow
    exports: ExportFlow
    operators: OperatorFlow
    erasure: EraseFlow
    usage: UsageFlow
    scalings: ScalingFlow
    canaries: Canaries
    jobs: JobFlow
    feed: Feed
    streams: Streams
    files: FileFlow
    batches: BatchFlow
    webhooks: WebhookFlow
    ready: Callable[[], Awaitable[Mapping[str, bool]]]


DEADLINE = "x-deadline-ms"
DEADLINE_PARAMETER: dict[str, Any] = {
    "name": DEADLINE,
    "in": "header",
    "required": False,
    "description": "Milliseconds from the arrival of the request after which its answer is not "
    "wanted any more; at most `limits.deadline_s_max`.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 3_600_000},
}
_MILLISECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Ask:
    """A request whose caller is known."""

    request: Request
    service: Service
    who: Caller

    @property
    def id(self) -> str:
        """The id that the reply carries and the log shows."""
        return cast("str", self.request.scope["state"]["request_id"])

    @property
    def until(self) -> float | None:
        """When the client wants to have its answer, on the service's clock. Raises BadInput."""
        text = self.request.headers.get(DEADLINE)
        if text is None:
            return None
        most = int(self.service.context.settings.limits.deadline_s_max * 1e3)
        if not _MILLISECONDS.fullmatch(text) or not 1 <= int(text) <= most:
            raise BadInput(f"{DEADLINE} must be an integer from 1 to {most}.", param=DEADLINE)
        return cast("float", self.request.scope["state"]["arrived"]) + int(text) / 1e3

    def timed(self, timing: Timing) -> None:
        """Note how long the parts of the work took, for the headers of the reply."""
        state = self.request.scope["state"]
        state["timing"], state["timed_at"] = timing, self.service.context.clock()


@dataclass(frozen=True, slots=True)
class Order:
    """A request of an operator; `by` is what the audit log calls them."""

    request: Request
    operators: OperatorFlow
    erasure: EraseFlow
    scalings: ScalingFlow
    canaries: Canaries
    by: str


async def service(request: Request) -> Service:
    """The replica's service."""
    return cast("Callable[[], Service]", request.app.state.service)()


async def ask(request: Request) -> Ask:
    """Who is asking; also notes it for the rate headers. Raises Unauthorized, BadInput."""
    refuse_nul(request)
    found, state = await service(request), request.scope["state"]
    if "caller" not in state:  # `Gate` has let everybody in who comes to a charged route
        state["caller"] = await found.door.caller(request.headers.get("authorization"))
    return Ask(request, found, state["caller"])


async def order(ask: Annotated[Ask, Depends(ask)]) -> Order:
    """What an operator asks. Raises Unauthorized, Forbidden."""
    require_admin(ask.who)
    key_id, _ = parse(ask.request.headers.get("authorization"))
    found = ask.service
    return Order(
        ask.request,
        found.operators,
        found.erasure,
        found.scalings,
        found.canaries,
        f"key:{key_id}",
    )


Served = Annotated[Service, Depends(service)]
Asked = Annotated[Ask, Depends(ask)]
Ordered = Annotated[Order, Depends(order)]

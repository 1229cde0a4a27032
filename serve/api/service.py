"""What the routes need of one ingress replica, and how they reach it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from serve.admission.keys import Door
from serve.flows.collections import CollectionFlow
from serve.flows.context import Context
from serve.flows.embed import EmbedFlow
from serve.flows.ingest import IngestFlow
from serve.flows.search import SearchFlow
from serve.records import Caller


@dataclass(frozen=True, slots=True)
class Service:
    """Everything behind the routes. `ready` answers part by part: name -> usable."""

    context: Context
    door: Door
    embed: EmbedFlow
    collections: CollectionFlow
    ingest: IngestFlow
    search: SearchFlow
    ready: Callable[[], Awaitable[Mapping[str, bool]]]


# Shown in OpenAPI only: `Door` reads the header, so that every refusal is one of our errors.
BEARER = HTTPBearer(auto_error=False, bearerFormat="hr_ID_SECRET", description="Your API key.")


def service(request: Request) -> Service:
    """The replica's service."""
    return cast("Callable[[], Service]", request.app.state.service)()


async def caller(request: Request, _: Annotated[object, Security(BEARER)]) -> Caller:
    """Who is asking; also notes it for the rate headers. Raises Unauthorized."""
    who = await service(request).door.caller(request.headers.get("authorization"))
    request.state.caller = who
    return who


def request_id(request: Request) -> str:
    """The id that the reply carries and the log shows."""
    return cast("str", request.state.request_id)


Served = Annotated[Service, Depends(service)]
Who = Annotated[Caller, Depends(caller)]
RequestId = Annotated[str, Depends(request_id)]

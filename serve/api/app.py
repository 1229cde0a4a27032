"""The FastAPI application. Built on the replica by a function, so nothing of it is pickled."""

import logging
from collections.abc import Callable, Iterator

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serve.api import (
    admin,
    batches,
    canaries,
    collections,
    documents,
    embeddings,
    exports,
    files,
    health,
    job_events,
    jobs,
    models,
    queues,
    receipts,
    rerank,
    search,
    usage,
    vectors,
    webhooks,
)
from serve.api.envelope import Envelope
from serve.api.gate import Charged, Gate
from serve.api.openapi import describe
from serve.api.problems import respond
from serve.api.service import Service
from serve.errors import BadInput, Internal, MethodNotAllowed, NotFound, ServiceError
from serve.records import Klass


CHARGED: tuple[tuple[APIRouter, Klass], ...] = (
    (embeddings.router, "interactive"),
    (search.router, "interactive"),
    (rerank.router, "interactive"),
    (documents.router, "bulk"),
    (vectors.router, "bulk"),
    (queues.router, "bulk"),
    (exports.router, "bulk"),
    (vectors.reads, "interactive"),
    (jobs.router, "bulk"),
    (files.router, "bulk"),
    (batches.router, "bulk"),
    (collections.router, "interactive"),
    (webhooks.router, "interactive"),
)
FREE = (
    health.router,
    models.router,
    usage.router,
    admin.router,
    canaries.router,
    jobs.free,
    receipts.router,
    files.free,
    batches.free,
    job_events.router,
    webhooks.free,
)

log = logging.getLogger("headrace.api")


def create_app(service: Callable[[], Service], *, id_echoed: bool = False) -> FastAPI:
    """All routes over one service, which `service` finds once requests come.

    `id_echoed`: the server in front sets `x-request-id` on every reply itself, as Ray's does.
    """
    app = FastAPI(
        title="Headrace",
        version="0.1.0",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,  # a redirect would drop a client's body and is no typed error
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    for router in (*(router for router, _ in CHARGED), *FREE):
        app.include_router(router)
    app.add_middleware(Gate, service=service, charged=list(_charged()))
    app.add_middleware(Envelope, service=service, id_echoed=id_echoed)  # the last one is outermost
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    describe(app)
    return app


def _charged() -> Iterator[Charged]:
    for router, klass in CHARGED:
        for route in router.routes:
            if isinstance(route, APIRoute):
                yield frozenset(route.methods or ()), route.path_regex, klass, route.name


async def _service_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ServiceError):  # the registration above promises it
        raise error
    if isinstance(error, Internal):
        log.error("request %s: %s", request.state.request_id, error)
    return respond(error, request.scope)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path or a wrong method."""
    if not isinstance(error, HTTPException):  # the registration above promises it
        raise error
    failure: ServiceError
    if error.status_code == NotFound.status:
        failure = NotFound("There is no such path.")
    elif error.status_code == MethodNotAllowed.status:
        failure = MethodNotAllowed(f"{request.method[:16]} is not supported here.")
    else:
        failure = BadInput("The request is not valid.")
    return respond(failure, request.scope, error.headers)

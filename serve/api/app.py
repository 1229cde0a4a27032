"""The FastAPI application. Built on the replica by a function, so nothing of it is pickled."""

import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serve.api import collections, documents, embeddings, health, models, search
from serve.api.envelope import Envelope
from serve.api.problems import respond
from serve.api.service import Service
from serve.errors import BadInput, Internal, NotFound, ServiceError


log = logging.getLogger("headrace.api")

DOCUMENTED: tuple[type[BaseModel], ...] = (documents.DocumentBody,)
"""Models that route bodies refer to by name."""


def create_app(service: Callable[[], Service]) -> FastAPI:
    """All routes over one service, which `service` finds once requests come."""
    app = FastAPI(title="Headrace", version="0.1.0", docs_url="/docs", redoc_url=None)
    app.state.service = service
    for module in (health, embeddings, models, collections, documents, search):
        app.include_router(module.router)
    app.add_middleware(Envelope, service=service)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    _name_schemas(app)
    return app


async def _service_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, ServiceError):  # the registration above promises it
        raise error
    if isinstance(error, Internal):
        log.error("request %s: %s", request.state.request_id, error)
    return respond(error, request.url.path)


async def _not_valid(request: Request, error: Exception) -> Response:
    return respond(BadInput(f"The request is not valid: {error}"[:300]), request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path or a wrong method."""
    status = error.status_code if isinstance(error, HTTPException) else NotFound.status
    if status == NotFound.status:
        return respond(NotFound("There is no such path."), request.url.path)
    failure = BadInput(f"{request.method} is not supported here.", code="method_not_allowed")
    answer = respond(failure, request.url.path)
    answer.status_code = status
    return answer


async def _fault(request: Request, error: Exception) -> Response:
    """A named rim: whatever nobody expected becomes a 500 without a traceback."""
    log.error("request %s failed", request.state.request_id, exc_info=error)
    failure = Internal(f"Internal error; quote {request.state.request_id}.")
    return respond(failure, request.url.path)


def _name_schemas(app: FastAPI) -> None:
    """Add the models that bodies refer to: FastAPI only knows bodies that it parses itself."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        schema = made()
        named = schema.setdefault("components", {}).setdefault("schemas", {})
        for model in DOCUMENTED:
            named[model.__name__] = model.model_json_schema()
        return schema

    app.openapi = openapi  # type: ignore[method-assign]

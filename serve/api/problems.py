"""One table from our errors to HTTP: OpenAI's error object on OpenAI's routes, RFC 9457 on ours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson
from fastapi import Response
from starlette.types import Scope

from serve.errors import (
    BadInput,
    Conflict,
    DeadlineExceeded,
    Fenced,
    Forbidden,
    IndexUnavailable,
    Internal,
    LedgerUnavailable,
    MethodNotAllowed,
    Mismatch,
    ModelUnavailable,
    NotFound,
    NotSatisfiable,
    Overloaded,
    PoisonInput,
    QuotaExceeded,
    ServiceError,
    StoreUnavailable,
    TooLarge,
    Unauthorized,
)


IANA = "https://iana.org/assignments/http-problem-types"


@dataclass(frozen=True, slots=True)
class Row:
    """How one class of errors looks: `kind` is OpenAI's `type`, `title` and `uri` RFC 9457's."""

    kind: str
    title: str
    uri: str = "about:blank"


TABLE: dict[type[ServiceError], Row] = {
    BadInput: Row("invalid_request_error", "The request is not valid"),
    Unauthorized: Row("invalid_request_error", "The key is missing or not valid"),
    Forbidden: Row("invalid_request_error", "Not allowed"),
    NotFound: Row("invalid_request_error", "Not found"),
    MethodNotAllowed: Row("invalid_request_error", "The method is not supported here"),
    NotSatisfiable: Row("invalid_request_error", "The range is not satisfiable"),
    Conflict: Row("invalid_request_error", "Not possible in its present state"),
    Mismatch: Row("invalid_request_error", "The key was used with another request"),
    TooLarge: Row("invalid_request_error", "The body is too large"),
    PoisonInput: Row("invalid_request_error", "An input cannot be embedded"),
    QuotaExceeded: Row("rate_limit_exceeded", "Quota exceeded", f"{IANA}#quota-exceeded"),
    Overloaded: Row("server_error", "Overloaded", f"{IANA}#temporary-reduced-capacity"),
    ModelUnavailable: Row("server_error", "The model is not available"),
    IndexUnavailable: Row("server_error", "The index is not available"),
    StoreUnavailable: Row("server_error", "The store is not available"),
    LedgerUnavailable: Row("server_error", "The ledger is not available"),
    DeadlineExceeded: Row("server_error", "The deadline passed"),
    Fenced: Row("server_error", "Another writer took over"),
    Internal: Row("server_error", "Internal error"),
}

OPENAI_PATHS = ("/v1/embeddings", "/v1/models", "/v1/files", "/v1/batches")


def openai_body(error: ServiceError) -> dict[str, Any]:
    """OpenAI's error object: always all four keys.

    As at OpenAI, the type of a 429 names the dimension, and its code is `rate_limit_exceeded` when
    waiting helps, else `insufficient_quota`.
    """
    kind, code = TABLE[type(error)].kind, error.code
    if isinstance(error, QuotaExceeded):
        waits = error.retry_after_s is not None
        kind, code = error.code, QuotaExceeded.code if waits else "insufficient_quota"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def problem_body(error: ServiceError, path: str | None = None) -> dict[str, Any]:
    """RFC 9457 problem details; `code` and `param` are ours, `violated-policies` the IETF's.

    `path` is the request's, decoded; without it there is no `instance`.
    """
    row = TABLE[type(error)]
    body: dict[str, Any] = {
        "type": row.uri,
        "title": row.title,
        "status": error.status,
        "detail": error.message,
        "code": error.code,
    }
    if path is not None:
        body["instance"] = quote(path)
    if error.param is not None:
        body["param"] = error.param
    if isinstance(error, QuotaExceeded):
        body["violated-policies"] = [error.code]
    return body


def retry_headers(error: ServiceError) -> dict[str, str]:
    """`Retry-After` in whole seconds, rounded up, and its exact twin in milliseconds.

    OpenAI's clients repeat every 409, 429 and 504 of their own accord: those that waiting cannot
    cure say so, such as a deadline that the client sends again.
    """
    if error.retry_after_s is not None:
        return {
            "retry-after": str(math.ceil(error.retry_after_s)),
            "retry-after-ms": str(math.ceil(error.retry_after_s * 1e3)),
        }
    if isinstance(error, QuotaExceeded | Conflict | DeadlineExceeded):
        return {"x-should-retry": "false"}
    return {}


def respond(
    error: ServiceError, scope: Scope, headers: Mapping[str, str] | None = None
) -> Response:
    """The reply for a failure; the request's path tells in which of the two shapes.

    Notes a quota's name for the rate headers.
    """
    path: str = scope["path"]
    headers = {**(headers or {}), **retry_headers(error)}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, QuotaExceeded):
        scope["state"]["violated"] = error.code
    if path.startswith(OPENAI_PATHS):
        body, media = openai_body(error), "application/json"
    else:
        body, media = problem_body(error, path), "application/problem+json"
    return Response(orjson.dumps(body), error.status, headers, media)

"""`Idempotency-Key`: the same key with the same request is done once."""

import hashlib
import re
from typing import Any

import orjson
from fastapi import Request

from serve.api.wire import Body
from serve.errors import BadInput
from serve.items import Once


HEADER = "idempotency-key"
REPLAYED = "idempotent-replayed"

IDEMPOTENCY_PARAMETER: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A request with the same key and body answers with the first one's job, and "
    "`idempotent-replayed: true`; with another body it is refused.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
_KEY = re.compile(r"[!-~]{1,255}")


def once(request: Request, body: Body, kept_s: float) -> Once | None:
    """The request's key, if it has one, kept for so long. Raises BadInput.

    Its fingerprint is the SHA-256 of method, path and the body with its fields in order and its
    defaults written out.
    """
    key = request.headers.get(HEADER)
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise BadInput(
            "An Idempotency-Key has 1 to 255 visible ASCII characters.", param="Idempotency-Key"
        )
    try:
        canonical = orjson.dumps(body.model_dump(by_alias=True), option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError):  # pydantic and orjson write fewer levels than orjson reads
        raise BadInput("The body is nested too deeply.", code="invalid_json") from None
    begin = f"{request.method} {request.url.path}\n".encode()
    return Once(key, hashlib.sha256(begin + canonical).hexdigest(), kept_s)

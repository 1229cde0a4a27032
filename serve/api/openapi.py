"""What FastAPI cannot see of our routes: they read keys and bodies and write errors themselves.

`python -m serve.api > docs/openapi.json` writes the page that a test compares.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.allowance import Allowance
from serve.api.problems import OPENAI_PATHS
from serve.api.shapes import OpenAIError, Problem
from serve.api.wire import REF, Body


WITH_KEY = "/v1/"
BEARER = {
    "type": "http",
    "scheme": "bearer",
    "bearerFormat": "hr_ID_SECRET",
    "description": "Your API key.",
}


def describe(app: FastAPI) -> None:
    """Complete the application's OpenAPI: bodies, and one error reply on each route with a key."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        schema = made()
        named = schema["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422
            named.pop(unused, None)
        models: tuple[type[BaseModel], ...] = (
            *Body.__subclasses__(),
            Allowance,
            OpenAIError,
            Problem,
        )
        _, found = models_json_schema([(one, "validation") for one in models], ref_template=REF)
        schema["components"]["schemas"] = dict(sorted({**named, **found["$defs"]}.items()))
        schema["components"]["securitySchemes"] = {"HTTPBearer": BEARER}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if path.startswith(WITH_KEY):
                    operation["security"] = [{"HTTPBearer": []}]
                    operation["responses"]["default"] = _error(path)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _error(path: str) -> dict[str, Any]:
    openai = path.startswith(OPENAI_PATHS)
    media = "application/json" if openai else "application/problem+json"
    ref = REF.format(model=(OpenAIError if openai else Problem).__name__)
    return {
        "description": "An error; docs/api.md lists them.",
        "content": {media: {"schema": {"$ref": ref}}},
    }

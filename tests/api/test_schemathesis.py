"""Requests made up from our own OpenAPI, over HTTP: no 5xx, and every reply as OpenAPI says."""

from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]

schema = schemathesis.openapi.from_path(Path(__file__).parents[2] / "docs" / "openapi.json")
schema.config.phases.coverage.enabled = False  # thousands of requests, for other gains


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, headers=served.headers) as client:
        yield client


@schema.parametrize()
@settings(max_examples=6, deadline=None)
def test_made_up_requests(case, served, http):
    http.post("/v1/collections", json={"name": "books"})  # the last request may have deleted it
    for word in case.path_parameters.keys() & {"name", "collection"}:
        case.path_parameters[word] = "books"
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "plain"  # else nearly all of them end at an unknown model
    if str((case.headers or {}).get("x-deadline-ms", "x")).isdigit():
        case.headers["x-deadline-ms"] = "60000"  # a short one may well end in a 504
    response = case.call(base_url=served.url, headers=served.headers)
    case.validate_response(response, checks=CHECKS)

"""Writes the OpenAPI of the service: `python -m serve.api > docs/openapi.json`."""

import json
import sys

from serve.api.app import create_app
from serve.api.service import Service
from serve.errors import Internal


def _none() -> Service:
    raise Internal("There is no service here, only its description.")


if __name__ == "__main__":
    sys.stdout.write(json.dumps(create_app(_none).openapi(), indent=2) + "\n")

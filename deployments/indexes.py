"""Which vector index a process opens."""

import os
from pathlib import Path

from serve.config import Settings
from serve.ports import Index


def make_index(settings: Settings) -> Index:
    """The backend that the settings name; it connects on first use, or with `open`.

    Each has its own library, which only those that need it import. Raises RuntimeError when a
    variable that the settings name is not set, or not what it should be.
    """
    match settings.index.backend:
        case "lancedb":
            from serve.index.lancedb import LanceIndex  # noqa: PLC0415

            return LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)
        case "pgvector":
            from serve.index.pgvector import PgIndex  # noqa: PLC0415

            name = settings.index.pgvector.url_env
            try:
                return PgIndex(_secret("index.pgvector.url_env", name), settings.index)
            except ValueError as error:
                raise RuntimeError(f"index.pgvector.url_env: {name} is {error}") from None


def _secret(setting: str, name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RuntimeError(f"{setting}: the environment variable {name} is not set")
    return value

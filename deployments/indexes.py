"""Which vector index a process opens."""

import os
from pathlib import Path

from serve.config import Settings
from serve.ports import Index


def make_index(settings: Settings) -> Index:
    """The backend that the settings name; it connects on first use, or with `open`.

    Raises RuntimeError when a variable that its settings name is not set.
    """
    match settings.index.backend:
        case "qdrant":
            from serve.index.qdrant import QdrantIndex  # noqa: PLC0415  as below

            key = _secret("index.qdrant.api_key_env", settings.index.qdrant.api_key_env)
            return QdrantIndex(settings.index, key)
        case "lancedb":
            from serve.index.lancedb import LanceIndex  # noqa: PLC0415  each has its own library

            return LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)


def _secret(setting: str, name: str) -> str:
    """The header value in the environment variable that a setting names; empty when it names none."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise RuntimeError(f"{setting}: the environment variable {name} is not set, or not ASCII")
    return key

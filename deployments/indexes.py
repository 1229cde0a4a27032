"""Which vector index a process opens."""

import os
import time
from pathlib import Path

from serve.config import Index as IndexSettings
from serve.config import Settings
from serve.ports import Index


def make_index(settings: Settings) -> Index:
    """The backend that the settings name; it connects on first use, or with `open`.

    Each has its own library, which only those that need it import. Raises RuntimeError when a
    variable that the settings name is not set, or not what it should be.
    """
    index = settings.index
    match index.backend:
        case "lancedb":
            from serve.index.lancedb import LanceIndex  # noqa: PLC0415

            uri = index.uri if index.remote else str(Path(settings.data_dir) / index.uri)
            return LanceIndex(uri, index, storage=_storage(index))
        case "pgvector":
            from serve.index.pgvector import PgIndex  # noqa: PLC0415

            name = index.pgvector.url_env
            try:
                return PgIndex(_secret("index.pgvector.url_env", name), index)
            except ValueError as error:
                raise RuntimeError(f"index.pgvector.url_env: {name} is {error}") from None
        case "qdrant":
            from serve.index.qdrant import QdrantIndex  # noqa: PLC0415

            name = index.qdrant.api_key_env
            return QdrantIndex(index, _secret("index.qdrant.api_key_env", name) if name else "")
        case "pinecone":
            from serve.index.pinecone import PineconeIndex  # noqa: PLC0415

            key = _secret("index.pinecone.api_key_env", index.pinecone.api_key_env)
            return PineconeIndex(index.pinecone, key, time.monotonic)


def _storage(index: IndexSettings) -> dict[str, str]:
    named = index.lancedb.storage_env
    return {
        option: _secret(f"index.lancedb.storage_env.{option}", name)
        for option, name in named.items()
    }


def _secret(setting: str, name: str) -> str:
    """What is in the environment variable that a setting names; it must be fit for a header or a URL."""
    value = os.environ.get(name, "").strip()
    if not (value and value.isascii() and value.isprintable()):
        raise RuntimeError(f"{setting}: the environment variable {name} is not set, or not ASCII")
    return value

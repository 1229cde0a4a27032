"""Which vector index a process opens."""

import os
import time
from pathlib import Path

from serve.config import Settings
from serve.ports import Index


def make_index(settings: Settings) -> Index:
    """The backend that the settings name; it connects on first use, or with `open`.

    Raises RuntimeError when the variable that `index.pinecone.api_key_env` names is not set.
    """
    match settings.index.backend:
        case "lancedb":
            from serve.index.lancedb import LanceIndex  # noqa: PLC0415  each has its own library

            return LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)
        case "pinecone":
            from serve.index.pinecone import PineconeIndex  # noqa: PLC0415  as above

            name = settings.index.pinecone.api_key_env
            return PineconeIndex(
                settings.index.pinecone, _secret("index.pinecone.api_key_env", name), time.monotonic
            )


def _secret(setting: str, name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise RuntimeError(f"{setting}: the environment variable {name} is not set")
    return value

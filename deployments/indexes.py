"""Which vector index a process opens."""

from pathlib import Path

from serve.config import Settings
from serve.ports import Index


def make_index(settings: Settings) -> Index:
    """The backend that the settings name; it connects on first use, or with `open`."""
    from serve.index.lancedb import LanceIndex  # noqa: PLC0415  each backend has its own library

    return LanceIndex(str(Path(settings.data_dir) / settings.index.uri), settings.index)

"""Where the key is from that seals secrets in the Store: the environment, or a file beside it."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from serve.config import Settings
from serve.jobs.vault import Vault


KEY_FILE = "webhooks.key"


def open_vault(settings: Settings) -> Vault:
    """With the key that `webhooks.key_env` names, or that of the file under `data_dir`, made if new.

    Raises RuntimeError when there is no such variable, or it holds no key.
    """
    name = settings.webhooks.key_env
    place = f"the environment variable {name}" if name else str(_path(settings))
    keys = os.environ.get(name) if name else _kept(_path(settings))
    if not keys:
        raise RuntimeError(f"webhooks.key_env: {place} is not set")
    try:
        return Vault(keys)
    except ValueError as error:
        raise RuntimeError(f"webhooks.key_env: {place} holds no key: {error}") from None


def _path(settings: Settings) -> Path:
    return Path(settings.data_dir) / KEY_FILE


def _kept(path: Path) -> str:
    """The file's content. Whoever is first makes it; a link appears whole or not at all."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        number, new = tempfile.mkstemp(dir=path.parent, prefix=f"{KEY_FILE}.")  # 0600
        try:
            with os.fdopen(number, "w") as file:
                file.write(Vault.new_key())
                file.flush()
                os.fsync(number)
            with suppress(FileExistsError):
                os.link(new, path)
        finally:
            Path(new).unlink()
    return path.read_text(encoding="ascii").strip()

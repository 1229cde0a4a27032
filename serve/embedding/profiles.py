"""What a warm-up measured of a model, kept in a folder so that the next start need not do it again.

A profile is a small JSON file, named after everything that it depends on; it appears by one rename.
One that is damaged, or of something else, is ignored and made anew. When it was made is its file's
own date.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from pydantic import Field, ValidationError

from serve.config import Batch, Model
from serve.embedding.graphs import versions
from serve.embedding.packing import Pace
from serve.section import Section


log = logging.getLogger("headrace.profiles")

PACKAGES = ("headrace", "openvino")
"""What a profile depends on beside what graphs do."""

NAME_CHARS = 12

TURN_S_MAX = 60.0
"""A first warm-up takes 1 to 3 s; who waited longer, for one that hangs, measures beside it."""

NO_MATTER = frozenset(
    {
        *("id", "source", "owned_by", "created", "query_prefix", "document_prefix", "matryoshka"),
        *("int8_spread", "pinned", "unload_after_s", "torch_fallback"),
    }
)
"""Settings of a model that change nothing of its speed or size."""


class Profile(Section):
    """One model on one device: the pace of its batches, the best budget of one, its memory.

    `made_of` is what it holds for, `engine` is the class that ran.
    """

    overhead_s: float = Field(ge=0, lt=1e6)
    token_s: float = Field(gt=0, lt=1e3)
    budget_tokens: int = Field(ge=1, le=10**7)
    bytes: int = Field(ge=0, le=10**14)
    engine: str
    made_of: Mapping[str, object]

    @property
    def pace(self) -> Pace:
        """A new one, which may learn."""
        return Pace(overhead_s=self.overhead_s, token_s=self.token_s)


@dataclass(frozen=True, slots=True)
class Place:
    """Where models run: the device by name, the CPU threads, and the bounds of a batch."""

    device: str
    threads: int
    batch: Batch

    def made_of(self, model: Model) -> dict[str, object]:
        """All that a profile depends on."""
        return {
            "model": model.model_dump(mode="json", exclude=set(NO_MATTER)),
            "device": self.device,
            "threads": self.threads,
            "batch": [self.batch.tokens_min, self.batch.tokens_max, self.batch.items_max],
            "versions": versions() | {name: _version(name) for name in PACKAGES},
        }


class Profiles:
    """The profiles in one folder, which processes may share."""

    def __init__(self, folder: Path, place: Place) -> None:
        self._folder = folder
        self._place = place

    def find(self, model: Model) -> Profile | None:
        """The profile of a model on this device, if there is a sound one."""
        made_of = self._place.made_of(model)
        path = self._path(model, made_of)
        try:
            profile = Profile.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("the profile %s cannot be read, and is measured again: %s", path, error)
            return None
        if profile.made_of != made_of:
            log.warning("the profile %s is of something else, and is measured again", path)
            return None
        return profile

    def keep(self, model: Model, profile: Profile) -> None:
        """Write it; what cannot be written is measured again at the next start."""
        path = self._path(model, profile.made_of)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            part.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            log.warning("the profile %s cannot be written: %s", path, error)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One process after another: those that measure at once measure each other. Five replicas that
        started together on two cores chose budgets of 256 and of 1,024 tokens for one model.
        """
        lock = FileLock(self._folder / "turn.lock", timeout=TURN_S_MAX)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:  # a Timeout is one
            log.warning(
                "no turn to measure in %s, and measured all the same: %s", self._folder, error
            )
        try:
            yield
        finally:
            lock.release()

    def made_of(self, model: Model) -> dict[str, object]:
        """What a profile of that model, made now, depends on."""
        return self._place.made_of(model)

    def _path(self, model: Model, made_of: Mapping[str, object]) -> Path:
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{model.sha256[:NAME_CHARS]}-{digest[:NAME_CHARS]}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"

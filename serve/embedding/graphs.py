"""Graphs of models for ONNX Runtime: each is made once, checked, and kept in a folder.

A graph is a folder of its own, named after everything that it was made of. It appears by one rename
and is read through the SHA-256 of its files, so that a torn or damaged one is made again. Making one
takes half a minute and a gigabyte: `onnx_export` does it in a process of its own. A graph in int8 is
made of the one in float32, by `onnx_quantize`.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from serve.config import Model
from serve.embedding.files import model_folder
from serve.errors import ModelUnavailable


log = logging.getLogger("headrace.graphs")

GRAPH, FACTS = "graph.onnx", "facts.json"
"""In a graph's folder, beside the weights that the exporter puts into files of their own."""

PACKAGES = ("torch", "transformers", "sentence-transformers", "onnx", "onnxscript", "onnxruntime")
SOURCES = ("onnx_export.py", "sentence_transformers.py", "likeness.py", "sharing.py")
INT8_SOURCES = (*SOURCES, "onnx_quantize.py")
"""What decides what a graph says, beside the model's own files."""

EXPORT_S_MAX = 900.0
"""MiniLM takes half a minute on two quiet cores and 90 s on busy ones; models are up to 25 times larger."""

NAME_CHARS = 12

FLOAT32, INT8 = "float32", "int8"
"""What a graph computes with."""

EXPORTER, QUANTIZER = "serve.embedding.onnx_export", "serve.embedding.onnx_quantize"
"""Programs: what makes a graph of a model, and what makes an int8 one of that graph."""

Export = Callable[[Model, Path, int, Path | None], None]
"""Makes a graph of a model in an empty folder, with so many threads; an int8 one of that in a folder."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph on disk: what its engine must know, and how it came about.

    `row_tokens` is how long rows get that inputs share; 0: each has its own, the graph reads no others.
    `files` are the SHA-256 of its files by name, `cosine_min` is to what it was made of (torch; for int8
    the graph in float32), over the checked inputs. `loss` is what int8 costs, over English texts.
    """

    folder: Path
    files: Mapping[str, str]
    vocab_size: int
    pad_id: int
    pad_left: bool
    row_tokens: int
    cosine_min: float
    made_by: Mapping[str, str]
    loss: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """What ONNX Runtime opens."""
        return self.folder / GRAPH

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The graph in that folder; None when there is none, or it is not what was written."""
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            graph = cls(folder, **facts)
            sound = GRAPH in graph.files and graph.files == checksums(folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("the graph in %s cannot be read: %s", folder, error)
            return None
        if not sound:
            log.warning("the graph in %s is damaged: its checksums differ", folder)
        return graph if sound else None

    def write(self) -> None:
        """Keep the facts beside the graph: the last step of making one. Raises OSError."""
        facts = {key: value for key, value in asdict(self).items() if key != "folder"}
        (self.folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the facts (0.1 s for 90 MB). Raises OSError."""
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.name != FACTS:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def versions() -> dict[str, str]:
    """Of the packages that a graph depends on, without importing them."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def run_exporter(model: Model, folder: Path, threads: int, original: Path | None = None) -> None:
    """Make a graph in an empty folder, in a process of its own; of the graph in `original`, if given.

    Raises ModelUnavailable with the last thing that process said. It ends with this one.
    """
    here = model.model_copy(update={"source": str(model_folder(model).resolve())})
    command = [sys.executable, "-m", EXPORTER if original is None else QUANTIZER]
    command += [here.model_dump_json(), str(folder), str(threads)]
    command += [] if original is None else [str(original)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603  our own program
            command,
            cwd=Path(__file__).parents[2],  # where `serve` lies
            stdin=subprocess.PIPE,  # it leaves when this end is closed
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(EXPORT_S_MAX)
        except subprocess.TimeoutExpired:
            raise _failed(model, f"it took longer than {EXPORT_S_MAX:.0f} s") from None
        finally:
            process.kill()
            process.communicate()
        if status:
            said.seek(0)
            lines = said.read().decode(errors="replace").split("\n")
            raise _failed(model, next((line for line in lines[::-1] if line.strip()), f"{status=}"))


def leave_with_parent() -> None:
    """For that process: it leaves when its standard input is closed, so that it does not outlive a
    replica that was killed.
    """

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _failed(model: Model, reason: str) -> ModelUnavailable:
    return ModelUnavailable(f"Model {model.id}: no graph could be made of it: {reason}")


class Graphs:
    """The graphs in one folder, which processes may share.

    `export` makes one; a parameter for tests.
    """

    def __init__(self, folder: Path, export: Export = run_exporter) -> None:
        self._folder = folder.resolve()
        self._export = export

    def find(self, model: Model) -> Graph | None:
        """The graph of a model, if there is a sound one. Raises ModelUnavailable (no such folder)."""
        return Graph.read(self._folder / _name(model))

    def take(self, model: Model, *, threads: int) -> Graph:
        """The graph of a model, made now if there is none; of many who ask at once, one makes it.

        Raises ModelUnavailable when none can be made, or the folder cannot be written.
        """
        found = self.find(model)
        if found is not None:
            return found
        original = None
        if model.precision == INT8:
            in_float32 = model.model_copy(update={"precision": FLOAT32})
            original = self.take(in_float32, threads=threads).folder
        try:
            with self._locked(_name(model)):
                return self.find(model) or self._make(model, threads, original)
        except OSError as error:
            raise ModelUnavailable(
                f"Model {model.id}: the folder of graphs {self._folder} cannot be written: "
                f"{error.strerror or error}"
            ) from error

    def _make(self, model: Model, threads: int, original: Path | None) -> Graph:
        folder = self._folder / _name(model)
        part = folder.with_suffix(".part")
        log.info("making a graph of %s in %s", model.id, folder)
        shutil.rmtree(part, ignore_errors=True)  # of one who was killed
        part.mkdir()
        try:
            self._export(model, part, threads, original)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        made = Graph.read(folder)
        if made is None:
            raise _failed(model, "what was made cannot be read")
        return made

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """The kernel drops the lock with the process; who waits, waits for one export at most."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _name(model: Model) -> str:
    """The weights, and a digest of everything else that a graph was made of."""
    folder, here = model_folder(model), Path(__file__).parent
    precision, sources = (INT8, INT8_SOURCES) if model.precision == INT8 else (FLOAT32, SOURCES)
    files = [*sorted(folder.rglob("*.json")), *(here / name for name in sources)]
    made_of = {
        "weights": model.sha256,
        "settings": [model.dimensions, model.tokens_max, precision],
        "files": [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files],
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return f"{model.sha256[:NAME_CHARS]}-{digest[:NAME_CHARS]}"

"""Where a model's files are, and whether they are the ones that were meant.

Used by the ingress as well (tokenizer, revision), so nothing heavy is imported here.
"""

import hashlib
import importlib.util
from pathlib import Path

from serve.config import Model
from serve.errors import ModelUnavailable


WEIGHTS = "model.safetensors"
"""The one weights file that is loaded: a format that cannot hold code, in a single piece."""

REVISION_CHARS = 12

INT8 = "int8, recipe 1"
"""Names the space of int8 graphs: another recipe in `onnx_quantize` makes other vectors."""

PACKAGE = "package:"


def model_folder(model: Model) -> Path:
    """The folder of the model's files.

    `package:NAME/PATH` is found without importing the package; anything else is a folder.
    Raises ModelUnavailable when there is no such folder.
    """
    folder = Path(model.source)
    if model.source.startswith(PACKAGE):
        name, _, inside = model.source.removeprefix(PACKAGE).partition("/")
        folder = _package_folder(model, name) / inside
    if not folder.is_dir():
        raise ModelUnavailable(f"Model {model.id}: {model.source!r} is not a folder.")
    return folder


def _package_folder(model: Model, name: str) -> Path:
    # A dotted name would make find_spec import the parent package.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"Model {model.id}: the package {name!r} is not installed.")
    return Path(spec.submodule_search_locations[0])


def verify(model: Model) -> None:
    """Check the weights against the settings' SHA-256, reading the file once (90 MB: 0.1 s).

    A `fake` model has no files. Raises ModelUnavailable when the file is missing or differs.
    """
    if model.engine == "fake":
        return
    path = model_folder(model) / WEIGHTS
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelUnavailable(f"Model {model.id}: {WEIGHTS} cannot be read in its folder.") from (
            error
        )
    if found != model.sha256:
        raise ModelUnavailable(
            f"Model {model.id}: {WEIGHTS} has SHA-256 {found}, the settings say {model.sha256}."
        )


def weights_bytes(model: Model) -> int:
    """Size of the weights file; 0 when there is none, which a load will say."""
    try:
        return (model_folder(model) / WEIGHTS).stat().st_size
    except (OSError, ModelUnavailable):
        return 0


def revision(model: Model) -> str:
    """Names the vector space, 12 hex: two models of one revision make the same vectors.

    Floating point of any width is one space, int8 another: vectors of the two must never meet.
    """
    if model.engine == "fake":
        return _digest(f"fake:{model.id}:{model.dimensions}")
    if model.precision == "int8":
        return _digest(f"{model.sha256}:{INT8}")
    return model.sha256[:REVISION_CHARS]


def _digest(space: str) -> str:
    return hashlib.sha256(space.encode()).hexdigest()[:REVISION_CHARS]

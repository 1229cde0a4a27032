"""Starts Infinity, the embeddings server, as a peer: from virtual environments of its own, since it
needs other versions of nearly everything (`bench/README.md` says which).

Its request log is off, as ours is, and nothing it does leaves the machine.
"""

import importlib.metadata
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from bench.load import Target
from bench.report import ROOT
from bench.servers import Recipe, StartFailed, free_port
from deployments.places import DeployFile
from serve.config import Model
from serve.embedding.files import model_folder


Engine = Literal["torch", "optimum"]
"""Infinity's words: its default, and ONNX Runtime."""

ONNX = "headrace-bench-onnx"
"""Folder in the virtual environment with the model as an ONNX file, made once."""
EXPORT = ("--library", "transformers", "--task", "feature-extraction", "--optimize", "O3")
"""Token vectors, which Infinity's ONNX engine pools itself; fused as far as they stay exact."""
EXPORT_S_MAX = 600
FLAGS: Mapping[Engine, Sequence[str]] = {
    "torch": (),
    # Optimising is done by the export: what Infinity calls for it is not in optimum 2 any more.
    "optimum": ("--pooling-method", "mean", "--onnx-disable-optimize"),
}
PACKAGES = (
    "infinity-emb",
    "torch",
    "sentence-transformers",
    "transformers",
    "optimum",
    "onnxruntime",
)
"""What decides how fast it is."""
OFFLINE: Mapping[str, str] = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "INFINITY_ANONYMOUS_USAGE_STATS": "0",
}


@contextmanager
def infinity_recipe(
    name: str, venv: Path, engine: Engine, numbers: str = "auto"
) -> Iterator[Recipe]:
    """Infinity over the model of `config.yaml`, in the numbers of its `--dtype`.

    Raises StartFailed when it is not installed there, or the model cannot be made an ONNX file.
    """
    program = venv / "bin" / "infinity_emb"
    if not program.is_file():
        raise StartFailed(f"there is no {program}: install infinity-emb there, see bench/README.md")
    model = next(iter(DeployFile.read(ROOT / "config.yaml").settings.models.values()))
    folder = model_folder(model) if engine == "torch" else _onnx(venv, model)
    with tempfile.TemporaryDirectory(prefix="hr-", ignore_cleanup_errors=True) as place:
        port = free_port()
        # In the model's folder: it finds an ONNX file only under a relative path.
        command = [str(program), "v2", "--model-id", ".", "--served-model-name", model.id]
        command += ["--engine", engine, "--device", "cpu", "--dtype", numbers, *FLAGS[engine]]
        command += ["--log-level", "warning", "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        target = Target(name, f"{url}/embeddings", model.id)
        environment = {**OFFLINE, "INFINITY_HOME": place}
        yield Recipe(target, command, Path(place), f"{url}/health", environment, folder)


def _onnx(venv: Path, model: Model) -> Path:
    """The model as Infinity's own libraries export and optimise it, made once."""
    made = venv / ONNX
    if made.is_dir():
        return made
    command = [str(venv / "bin" / "optimum-cli"), "export", "onnx", *EXPORT]
    with tempfile.TemporaryDirectory(dir=venv) as name:
        part = Path(name) / "onnx"
        done = subprocess.run(
            [*command, "--model", str(model_folder(model)), str(part)],
            env={**os.environ, **OFFLINE},
            capture_output=True,
            text=True,
            timeout=EXPORT_S_MAX,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stderr.splitlines()[-10:])
            raise StartFailed(f"optimum-cli made no ONNX file of {model.id}:\n{last}")
        part.rename(made)
    return made


def versions(venv: Path) -> dict[str, str]:
    """Of the packages in the virtual environment, without importing them."""
    places = [str(place) for place in venv.glob("lib/python*/site-packages")]
    found = dict.fromkeys(PACKAGES, "absent")
    for name in PACKAGES:
        for one in importlib.metadata.distributions(name=name, path=places):
            found[name] = one.version
    return found

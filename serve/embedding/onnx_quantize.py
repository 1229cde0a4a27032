"""Makes an int8 graph of one in float32, and writes down what that costs.

    python -m serve.embedding.onnx_quantize MODEL_AS_JSON FOLDER THREADS ORIGINAL

`graphs` runs it, in a process of its own. It needs no torch: the graph in ORIGINAL was compared with
torch when it was made.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from onnxruntime.quantization import quantize_dynamic

from serve.config import Model
from serve.embedding.graphs import GRAPH, Graph, checksums, leave_with_parent, versions
from serve.embedding.likeness import checks, cosine_min, inputs, loss, paragraphs
from serve.embedding.onnx import OnnxEngine
from serve.errors import ModelUnavailable, ServiceError


COSINE_MIN = 0.95
"""Below this the vectors are not the model's: MiniLM keeps 0.97 and more."""


def quantize(model: Model, folder: Path, original: Path, *, threads: int) -> Graph:
    """Make the int8 graph of a model in an empty folder, of the float32 one in `original`.

    Raises ModelUnavailable when that is not sound or too much is lost, and whatever the quantizer
    raises.
    """
    exact = Graph.read(original)
    if exact is None:
        raise ModelUnavailable(f"Model {model.id}: its graph in float32 cannot be read.")
    _quantize(exact.path, folder / GRAPH)
    graph = replace(exact, folder=folder, files=checksums(folder), made_by=versions())
    theirs = OnnxEngine(model, exact, threads=threads)
    ours = OnnxEngine(model, graph, threads=threads)
    lost = loss(theirs, ours, inputs(model, paragraphs()))
    cosines = [cosine_min(theirs, ours, batch) for batch in checks(model)]
    cosine = float(np.min([*cosines, lost["cosine_min"]]))
    if not cosine >= COSINE_MIN:  # NaN compares as false
        raise ModelUnavailable(
            f"Model {model.id}: int8 loses too much: cosine {cosine:.4f} to float32, at least "
            f"{COSINE_MIN} is needed."
        )
    graph = replace(graph, cosine_min=cosine, loss=lost)
    graph.write()
    return graph


def _quantize(original: Path, path: Path) -> None:
    # One scale for each column of a matrix: with one for all of it MiniLM's least cosine is 0.88. Seven
    # bits: with eight, products saturate on CPUs without VNNI, and vectors would depend on the CPU.
    # Nothing but matrix products: the quantizer's attention is another operator of that name.
    with tempfile.TemporaryDirectory() as copy:  # the quantizer writes beside what it reads
        shutil.copytree(original.parent, copy, dirs_exist_ok=True)
        quantize_dynamic(
            Path(copy) / original.name,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            use_external_data_format=True,  # mapped, as the exporter's
        )
    for made in path.parent.iterdir():  # weights come readable for their owner only
        made.chmod(original.stat().st_mode)


def main() -> None:
    """Make one graph; the last line of a failure says why."""
    leave_with_parent()
    model, folder, threads, original = sys.argv[1:]
    try:
        quantize(
            Model.model_validate_json(model), Path(folder), Path(original), threads=int(threads)
        )
    except ServiceError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()

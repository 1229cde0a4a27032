"""Makes a graph of a model, checks it against torch, and writes down what its engine must know.

    python -m serve.embedding.onnx_export MODEL_AS_JSON FOLDER THREADS

`graphs` runs it, in a process of its own: the memory of torch and of the exporter goes with it.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from serve.config import Model
from serve.embedding.files import model_folder
from serve.embedding.graph_engine import IDS, MASK, VECTORS
from serve.embedding.graphs import GRAPH, Graph, checksums, leave_with_parent, versions
from serve.embedding.likeness import checks, cosine_min
from serve.embedding.onnx import OnnxEngine
from serve.embedding.sentence_transformers import Composed, SentenceTransformersEngine
from serve.errors import ModelUnavailable, ServiceError


OPSET = 23
"""The first with attention as one operator."""

COSINE_MIN = 0.9999


def export(model: Model, folder: Path, *, threads: int) -> Graph:
    """Make the graph of a model in an empty folder.

    Raises ModelUnavailable when the model cannot be loaded or its graph differs from it, and
    whatever torch's exporter raises.
    """
    original = SentenceTransformersEngine(model, model_folder(model), device="cpu", threads=threads)
    _save(original.composed, folder / GRAPH)
    rows = original.rows
    graph = Graph(
        folder, checksums(folder), rows.vocab_size, rows.pad_id, rows.pad_left, 0.0, versions()
    )
    ours = OnnxEngine(model, graph, threads=threads)
    cosine = float(np.min([cosine_min(original, ours, batch) for batch in checks(model)]))
    if not cosine >= COSINE_MIN:  # NaN compares as false
        raise ModelUnavailable(
            f"Model {model.id}: its graph differs from torch: cosine {cosine:.6f}, at least "
            f"{COSINE_MIN} is needed."
        )
    graph = replace(graph, cosine_min=cosine)
    graph.write()
    return graph


def _save(composed: Composed, path: Path) -> None:
    # Sizes unlike each other, and neither 0 nor 1, which the exporter would take for constants; two
    # tensors, since it takes one that is given twice for one input; and a mask that hides something.
    ids, mask = torch.ones((3, 17), dtype=torch.int64), torch.ones((3, 17), dtype=torch.int64)
    mask[1, 9:] = 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        composed,
        (ids, mask),
        dynamo=True,
        opset_version=OPSET,
        input_names=[IDS, MASK],
        output_names=[VECTORS],
        dynamic_shapes={IDS: free, MASK: free},
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch made no graph")
    # Weights in a file of their own are mapped, so that replicas share them; and no limit of 2 GB.
    program.save(path, external_data=True)


def main() -> None:
    """Make one graph; the last line of a failure says why."""
    leave_with_parent()
    model, folder, threads = sys.argv[1:]
    try:
        export(Model.model_validate_json(model), Path(folder), threads=int(threads))
    except ServiceError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    main()

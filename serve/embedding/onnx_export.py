"""Makes a graph of a model, checks it against torch, and writes down what its engine must know.

    python -m serve.embedding.onnx_export MODEL_AS_JSON FOLDER THREADS

`graphs` runs it, in a process of its own: the memory of torch and of the exporter goes with it.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from serve.config import Model
from serve.embedding.files import model_folder
from serve.embedding.graph_engine import IDS, MASK, MEMBERS, PLACES, POSITIONS, VECTORS
from serve.embedding.graphs import GRAPH, Graph, checksums, leave_with_parent, versions
from serve.embedding.likeness import checks, cosine_min
from serve.embedding.onnx import OnnxEngine
from serve.embedding.sentence_transformers import Composed, InRows, SentenceTransformersEngine
from serve.embedding.sharing import ROW_TOKENS
from serve.errors import ModelUnavailable, ServiceError


log = logging.getLogger("headrace.graphs")

OPSET = 23
"""The first with attention as one operator."""

COSINE_MIN = 0.9999


def export(model: Model, folder: Path, *, threads: int) -> Graph:
    """Make the graph of a model in an empty folder: one whose inputs share rows, where that gives the
    same vectors.

    Raises ModelUnavailable when the model cannot be loaded or its graph differs from it, and
    whatever torch's exporter raises.
    """
    original = SentenceTransformersEngine(model, model_folder(model), device="cpu", threads=threads)
    try:
        graph = _made(original, model, folder, threads, ROW_TOKENS)
    except Exception as error:  # noqa: BLE001  a model may take no positions, or look both ways only
        log.warning("inputs of %s get rows of their own: %s", model.id, error)
        for path in folder.iterdir():
            path.unlink()
        graph = _made(original, model, folder, threads, 0)
    graph.write()
    return graph


def _made(
    original: SentenceTransformersEngine, model: Model, folder: Path, threads: int, row_tokens: int
) -> Graph:
    """A graph that equals torch. Raises ModelUnavailable, and whatever torch's exporter raises."""
    _save(original.in_rows() if row_tokens else original.composed, folder / GRAPH)
    rows = original.rows
    graph = Graph(
        folder,
        checksums(folder),
        vocab_size=rows.vocab_size,
        pad_id=rows.pad_id,
        pad_left=rows.pad_left,
        row_tokens=row_tokens,
        cosine_min=0.0,
        made_by=versions(),
    )
    ours = OnnxEngine(model, graph, threads=threads)
    cosine = float(np.min([cosine_min(original, ours, batch) for batch in checks(model)]))
    if not cosine >= COSINE_MIN:  # NaN compares as false
        raise ModelUnavailable(
            f"Model {model.id}: its graph differs from torch: cosine {cosine:.6f}, at least "
            f"{COSINE_MIN} is needed."
        )
    return replace(graph, cosine_min=cosine)


def _save(module: Composed | InRows, path: Path) -> None:
    inputs = _examples(shared=isinstance(module, InRows))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[VECTORS],
        dynamic_shapes=dict.fromkeys(inputs, free),
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch made no graph")
    # Weights in a file of their own are mapped, so that replicas share them; and no limit of 2 GB.
    program.save(path, external_data=True)


def _examples(*, shared: bool) -> dict[str, torch.Tensor]:
    """Inputs of a graph by name, in the order of its module's arguments.

    Their sizes are unlike each other, and neither 0 nor 1, which the exporter would take for constants;
    each is a tensor of its own, since it takes one that is given twice for one input; and the mask hides
    something.
    """
    rows, inputs = (3, 17), (5, 13)
    mask = torch.ones(inputs if shared else rows, dtype=torch.int64)
    mask[1, 9:] = 0
    if not shared:
        return {IDS: torch.ones(rows, dtype=torch.int64), MASK: mask}
    return {
        IDS: torch.ones(rows, dtype=torch.int64),
        POSITIONS: torch.zeros(rows, dtype=torch.int64),
        MEMBERS: torch.zeros(rows, dtype=torch.int64),
        PLACES: torch.zeros(inputs, dtype=torch.int64),
        MASK: mask,
    }


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

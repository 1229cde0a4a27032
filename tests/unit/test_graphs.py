"""Graphs are made once, found again, and never trusted unchecked."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.config import Model
from serve.embedding import graphs
from serve.embedding.graphs import FACTS, GRAPH, Graph, Graphs, checksums, run_exporter
from serve.errors import ModelUnavailable


ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Model:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    return Model(
        id="m", engine="onnx", source=str(folder), sha256="ab" * 32, dimensions=4, tokens_max=16
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "graphs"


class Exporter:
    """Makes files instead of graphs, and counts."""

    def __init__(self) -> None:
        self.made = 0
        self.originals: list[Path | None] = []
        self.fault: Exception | None = None

    def __call__(self, model: Model, folder: Path, threads: int, original: Path | None) -> None:
        self.made += 1
        self.originals.append(original)
        assert threads == 2
        assert list(folder.iterdir()) == []
        (folder / GRAPH).write_bytes(b"nodes")
        (folder / f"{GRAPH}.data").write_bytes(b"weights")
        if self.fault is not None:
            raise self.fault
        Graph(folder, checksums(folder), 100, 0, False, 0, 0.99999, {"torch": "2"}).write()


@pytest.fixture
def exporter() -> Exporter:
    return Exporter()


def test_a_graph_is_made_once_and_found_by_the_next_process(model, folder, exporter):
    assert Graphs(folder, exporter).find(model) is None
    made = Graphs(folder, exporter).take(model, threads=2)
    assert made.path.read_bytes() == b"nodes"
    assert (made.vocab_size, made.pad_id, made.pad_left, made.cosine_min) == (
        100,
        0,
        False,
        0.99999,
    )
    assert Graphs(folder, exporter).take(model, threads=2) == made
    assert Graphs(folder, exporter).find(model) == made
    assert exporter.made == 1


def test_of_many_that_ask_at_once_one_makes_it(model, folder, exporter):
    gate = threading.Barrier(4)

    def ask() -> Graph:
        gate.wait(10)
        return Graphs(folder, exporter).take(model, threads=2)

    with ThreadPoolExecutor(4) as pool:
        made = [future.result(20) for future in [pool.submit(ask) for _ in range(4)]]
    assert made == [made[0]] * 4
    assert exporter.made == 1


def test_whatever_a_graph_is_made_of_names_it(model, folder, exporter, monkeypatch):
    def count() -> int:
        Graphs(folder, exporter).take(model, threads=2)
        return exporter.made

    assert count() == 1
    model = model.model_copy(update={"id": "other", "torch_fallback": False})
    assert count() == 1
    for number, update in enumerate(({"tokens_max": 8}, {"dimensions": 5}, {"sha256": "cd" * 32})):
        model = model.model_copy(update=update)
        assert count() == 2 + number
    pooling = Path(model.source) / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode": "cls"}')
    assert count() == 5
    monkeypatch.setattr(graphs, "versions", lambda: {"torch": "3"})
    assert count() == 6


def test_a_graph_in_int8_is_made_of_the_one_in_float32(model, folder, exporter):
    coarse = model.model_copy(update={"precision": "int8"})
    made = Graphs(folder, exporter).take(coarse, threads=2)
    exact = Graphs(folder, exporter).find(model)
    assert exact.folder != made.folder
    assert exporter.originals == [None, exact.folder]
    assert Graphs(folder, exporter).take(coarse, threads=2) == made
    assert Graphs(folder, exporter).take(model, threads=2) == exact
    same = model.model_copy(update={"precision": "float32"})
    assert Graphs(folder, exporter).find(same) == exact
    assert exporter.made == 2


def test_there_is_no_int8_where_float32_cannot_be_made(model, folder, exporter):
    exporter.fault = ModelUnavailable("it differs from torch")
    coarse = model.model_copy(update={"precision": "int8"})
    with pytest.raises(ModelUnavailable, match="differs"):
        Graphs(folder, exporter).take(coarse, threads=2)
    assert exporter.originals == [None]


def test_versions_name_every_package_that_has_a_say():
    found = graphs.versions()
    assert set(found) == set(graphs.PACKAGES)
    assert "absent" not in found.values()


@pytest.mark.parametrize("name", [GRAPH, f"{GRAPH}.data", FACTS])
@pytest.mark.parametrize("damage", ["changed", "gone", "stranger"])
def test_a_damaged_graph_is_made_again(model, folder, exporter, name, damage):
    made = Graphs(folder, exporter).take(model, threads=2)
    if damage == "changed":
        (made.folder / name).write_bytes(b"x")
    elif damage == "gone":
        (made.folder / name).unlink()
    else:
        (made.folder / f"{name}.old").write_bytes(b"x")
    assert Graphs(folder, exporter).find(model) is None
    assert Graphs(folder, exporter).take(model, threads=2) == made
    assert exporter.made == 2
    assert made.path.read_bytes() == b"nodes"


def test_facts_of_another_shape_are_not_believed(model, folder, exporter, caplog):
    made = Graphs(folder, exporter).take(model, threads=2)
    (made.folder / FACTS).write_text('{"files": {}}')
    assert Graphs(folder, exporter).find(model) is None
    assert "cannot be read" in caplog.text


def test_a_failed_export_leaves_nothing_and_is_tried_again(model, folder, exporter):
    exporter.fault = ModelUnavailable("it differs from torch")
    with pytest.raises(ModelUnavailable, match="differs"):
        Graphs(folder, exporter).take(model, threads=2)
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    exporter.fault = None
    Graphs(folder, exporter).take(model, threads=2)
    assert exporter.made == 2


def test_what_one_that_was_killed_has_left_is_swept(model, folder, exporter):
    made = Graphs(folder, exporter).take(model, threads=2)
    made.folder.rename(made.folder.with_suffix(".part"))
    assert Graphs(folder, exporter).take(model, threads=2) == made
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".lock"]


def test_an_export_that_makes_nothing_is_not_believed(model, folder):
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        Graphs(folder, lambda *_: None).take(model, threads=2)


def test_a_folder_that_cannot_be_written_is_named(model, folder, exporter):
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(ModelUnavailable, match=rf"{folder} cannot be written: File exists"):
        Graphs(folder, exporter).take(model, threads=2)


# --- the process ----------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a shell script in Python's place."""

    def put(text: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(graphs.sys, "executable", str(path))

    return put


def test_the_exporter_is_told_what_to_make_and_where(model, tmp_path, program):
    program('echo "$2" "$5" > "$4/said"; pwd >> "$4/said"; echo "$3" >> "$4/said"')
    run_exporter(model, tmp_path, 3)
    words, where, asked = (tmp_path / "said").read_text().splitlines()
    assert words == "serve.embedding.onnx_export 3"
    assert where == str(ROOT)
    assert Model.model_validate_json(asked) == model


def test_the_quantizer_is_told_what_to_make_it_of(model, tmp_path, program):
    program('echo "$2" "$5" "$6" > "$4/said"')
    run_exporter(model, tmp_path, 3, tmp_path / "float32")
    said = (tmp_path / "said").read_text().strip()
    assert said == f"serve.embedding.onnx_quantize 3 {tmp_path / 'float32'}"


def test_a_failed_exporter_is_quoted(model, tmp_path, program):
    program('echo "Traceback"; echo "KeyError: 7" >&2; echo; exit 1')
    with pytest.raises(ModelUnavailable, match=r"no graph could be made of it: KeyError: 7$"):
        run_exporter(model, tmp_path, 1)


def test_an_exporter_that_was_killed_says_so_by_its_status(model, tmp_path, program):
    program("kill -9 $$")
    with pytest.raises(ModelUnavailable, match="status=-9"):
        run_exporter(model, tmp_path, 1)


def test_an_exporter_that_hangs_is_ended(model, tmp_path, program, monkeypatch):
    program(f'echo $$ > "{tmp_path}/pid"; exec sleep 600')
    monkeypatch.setattr(graphs, "EXPORT_S_MAX", 0.5)
    with pytest.raises(ModelUnavailable, match="longer than"):
        run_exporter(model, tmp_path, 1)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_exporter_leaves_when_its_parent_is_gone(model, tmp_path):
    """Without torch: only how it starts is of interest, and that nothing else could end it."""
    code = (
        "import sys, threading\n"
        "from unittest.mock import MagicMock\n"
        "for name in ('torch', 'serve.embedding.sentence_transformers', 'serve.embedding.onnx'):\n"
        "    sys.modules[name] = MagicMock()\n"
        "from serve.embedding import onnx_export\n"
        "onnx_export.export = lambda *_, **__: (print('busy', flush=True), threading.Event().wait())\n"
        f"sys.argv = ['', {model.model_dump_json()!r}, {str(tmp_path)!r}, '1']\n"
        "onnx_export.main()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"busy\n"
        process.stdin.close()
        assert process.wait(20) == 1

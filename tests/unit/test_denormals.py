"""A model's threads flush denormals to zero, and only while it runs."""

import platform
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from serve.config import Settings
from serve.embedding import denormals, onnx
from serve.embedding.denormals import LAYOUTS, flushed


pytestmark = pytest.mark.skipif(
    denormals._LIBRARY is None, reason=f"no known layout of fenv_t on {platform.machine()}"
)

LEAST = np.float32(1.2e-38)
"""Just above the least normal number."""


def halved() -> float:
    return float((np.full(64, LEAST) * np.float32(0.5))[-1])


def taken_in() -> float:
    return float((np.full(64, np.float32(1e-40)) * np.float32(1e3))[-1])


def test_what_is_too_small_is_zero_within_and_what_it_was_before_and_after() -> None:
    assert halved() > 0
    with flushed():
        assert halved() == 0
        assert taken_in() == 0
        assert float(np.float32(1) / np.float32(3)) == pytest.approx(1 / 3)
        with flushed():
            assert halved() == 0
        assert halved() == 0
    assert halved() > 0
    assert taken_in() > 0


def test_it_ends_with_a_failure_and_is_no_other_threads_business() -> None:
    with ThreadPoolExecutor(1) as other:
        other.submit(halved).result()  # threads begin as those that start them
        with flushed():
            assert other.submit(halved).result() > 0
        with pytest.raises(ZeroDivisionError), flushed():
            int(halved()) // 0
    assert halved() > 0


def test_a_graph_runs_so_in_any_thread_and_leaves_it_as_it_was(monkeypatch) -> None:
    opened = []

    class Session:
        def __init__(self, _path, options, **_) -> None:
            opened.append((options, halved()))

        def run(self, _names, _feed):
            return [halved()]

    monkeypatch.setattr(onnx.onnxruntime, "InferenceSession", Session)
    run = onnx.open_run(Settings().pools[0].models[0], SimpleNamespace(path="graph"), 1)
    [(options, while_opened)] = opened
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"
    assert while_opened == 0  # and not after it, though ONNX Runtime sets its first opener's thread
    with ThreadPoolExecutor(1) as other:
        assert other.submit(run, {}).result() == 0
        assert other.submit(halved).result() > 0
    assert run({}) == 0
    assert halved() > 0


def test_another_system_computes_as_it_always_does(monkeypatch) -> None:
    monkeypatch.setattr(denormals.platform, "machine", lambda: "riscv64")
    assert denormals._found() is None
    monkeypatch.setattr(denormals, "_LIBRARY", denormals._found())
    with flushed():
        assert halved() > 0


def test_every_layout_lies_within_the_buffer() -> None:
    for layout in LAYOUTS.values():
        assert layout.offset + 4 <= denormals.FENV_BYTES

import sys
from pathlib import Path

import pytest

from bench.infinity import ONNX, infinity_recipe, versions
from bench.servers import StartFailed


@pytest.fixture
def venv(tmp_path):
    """A virtual environment that has the command and a model, and nothing behind them."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "infinity_emb").touch()
    (tmp_path / ONNX).mkdir()
    return tmp_path


def test_an_environment_without_infinity_is_refused(tmp_path):
    with (
        pytest.raises(StartFailed, match="install infinity-emb"),
        infinity_recipe("infinity", tmp_path, "torch"),
    ):
        pass


@pytest.mark.parametrize("engine", ["torch", "optimum"])
def test_infinity_stays_on_this_machine(venv, engine):
    with infinity_recipe("infinity", venv, engine) as recipe:
        words = list(recipe.command)
        assert words[words.index("--host") + 1] == "127.0.0.1"
        assert words[words.index("--engine") + 1] == engine
        assert recipe.target.model == words[words.index("--served-model-name") + 1]
        assert recipe.environment["HF_HUB_OFFLINE"] == "1"
        assert recipe.environment["INFINITY_ANONYMOUS_USAGE_STATS"] == "0"
        assert recipe.target.route == "/embeddings"
        assert (recipe.cwd == venv / ONNX) == (engine == "optimum")
    assert not recipe.folder.exists()


def test_versions_are_read_without_an_import(tmp_path):
    assert set(versions(tmp_path).values()) == {"absent"}
    assert versions(Path(sys.prefix))["torch"] != "absent"

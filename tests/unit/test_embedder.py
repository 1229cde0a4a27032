"""deployments.embedder: what a replica that could not start leaves behind."""

import pytest

from deployments.embedder import Embedder
from serve import config
from serve.config import Settings
from serve.embedding.pool import Pool
from serve.errors import ModelUnavailable


class Watched(Embedder):
    def __del__(self) -> None:
        """Python's own call; Serve's, which is awaited, the test makes."""


async def test_a_replica_whose_model_cannot_be_loaded_ends_in_good_order(monkeypatch):
    def fails(_pool: Pool) -> None:
        raise ModelUnavailable("The files are gone.")

    monkeypatch.setattr(Pool, "load", fails)
    model = config.Model(id="m", engine="fake", dimensions=8, tokens_max=64)
    settings = Settings(pools=(config.Pool(models=(model,)),))
    embedder = Watched.__new__(Watched)  # as Serve does
    with pytest.raises(ModelUnavailable):
        await Embedder.__init__(embedder, settings.pools[0], settings)
    await Embedder.__del__(embedder)

"""index.qdrant, and who opens it."""

import pytest
from pydantic import ValidationError

from deployments.indexes import make_index
from serve.config import Settings
from serve.index.qdrant import QdrantIndex


def settings(**own: object) -> Settings:
    return Settings.model_validate({"index": {"backend": "qdrant", "qdrant": own}})


@pytest.mark.parametrize(
    "url",
    ["https://x.cloud.qdrant.io:6333", "http://qdrant:6333/prefix", "http://[::1]:6333"],
)
def test_urls_of_servers(url):
    assert settings(url=url).index.qdrant.url == url


@pytest.mark.parametrize(
    "own",
    [
        {"url": ""},
        {"url": "qdrant:6333"},
        {"url": "grpc://qdrant:6334"},
        {"url": "https://:secret@qdrant"},
        {"url": "https://qdrant?api_key=secret"},
        {"url": "https://qdrant\n"},
        {"prefix": "a/b"},
        {"prefix": "x" * 65},
        {"api_key_env": "s3cret-key"},
        {"timeout_s": 0},
        {"ordering": "any"},
        {"api_key": "secret"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_named(own):
    with pytest.raises(ValidationError) as caught:
        settings(**own)
    [name] = own
    assert caught.value.errors()[0]["loc"] == ("index", "qdrant", name)


async def test_the_key_is_that_of_the_named_variable(monkeypatch):
    monkeypatch.setenv("QDRANT_KEY", " s3cret\n")
    index = make_index(settings(api_key_env="QDRANT_KEY"))
    assert isinstance(index, QdrantIndex)
    assert index._api_key == "s3cret"
    assert index.caps.consistency == "strong"
    plain = make_index(settings())
    assert isinstance(plain, QdrantIndex)
    assert plain._api_key == ""


@pytest.mark.parametrize("value", [None, "", " \n", "schlüssel", "two\nlines"])
def test_a_variable_that_holds_no_key_is_named(monkeypatch, value):
    monkeypatch.delenv("QDRANT_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("QDRANT_KEY", value)
    with pytest.raises(
        RuntimeError, match=r"index\.qdrant\.api_key_env: the environment variable QDRANT_KEY"
    ):
        make_index(settings(api_key_env="QDRANT_KEY"))

"""Which index is made, and which settings of Pinecone make no sense."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.indexes import make_index
from serve.config import Settings
from serve.index.lancedb import LanceIndex
from serve.index.pinecone import PineconeIndex


HOST = "docs-abc123.svc.aped-4627-b74a.pinecone.io"


def settings(**pinecone: Any) -> Settings:
    index = {"backend": "pinecone", "pinecone": {"host": HOST, **pinecone}}
    return Settings.model_validate({"index": index})


def test_the_settings_choose(monkeypatch):
    monkeypatch.setenv("PINECONE_API_KEY", "secret")
    assert isinstance(make_index(Settings()), LanceIndex)
    index = make_index(settings(max_items=100, max_bytes=2**20))
    assert isinstance(index, PineconeIndex)
    assert index.caps.max_items == 100
    assert 2**20 // 4 < index.caps.max_bytes < 2**20 // 3


def test_a_key_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(RuntimeError, match=r"index\.pinecone\.api_key_env: .* OTHER_KEY"):
        make_index(settings(api_key_env="OTHER_KEY"))


def test_the_backend_needs_a_host():
    with pytest.raises(ValidationError, match=r"index\.pinecone\.host"):
        Settings.model_validate({"index": {"backend": "pinecone"}})
    assert Settings.model_validate({"index": {"pinecone": {"max_items": 10}}})


@pytest.mark.parametrize(
    "host", [HOST, f"https://{HOST}", f"{HOST}:443", "http://127.0.0.1:8000", "http://localhost"]
)
def test_hosts_that_are_taken(host):
    assert settings(host=host).index.pinecone.host == host


@pytest.mark.parametrize(
    "change",
    [
        {"host": f"http://{HOST}"},  # the key would travel in the clear
        {"host": f"https://{HOST}/path"},
        {"host": f"{HOST}\n"},
        {"host": "user@host.io"},
        {"host": "http://localhost.evil.io"},
        {"api_key_env": ""},
        {"api_key_env": "pcsk_secret"},
        {"max_items": 1001},
        {"max_bytes": 1},
        {"deadline_s": 0},
        {"upserts_s": 0},
        {"metadata_bytes_max": 10},
    ],
)
def test_settings_that_make_no_sense_are_refused(change):
    with pytest.raises(ValidationError, match=rf"index\.pinecone\.{next(iter(change))}"):
        settings(**change)

"""Where LanceDB's tables lie: a folder under `data_dir` or an object store, and its options."""

from typing import Any

import pytest
from pydantic import ValidationError

from deployments.indexes import make_index
from serve.config import Settings
from serve.index.lancedb import LanceIndex


def settings(**index: Any) -> Settings:
    return Settings.model_validate({"data_dir": "/somewhere", "index": index})


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("index", "/somewhere/index"),
        ("/elsewhere", "/elsewhere"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/a", "az://container/a"),
    ],
)
def test_a_uri_is_a_folder_or_a_bucket(uri, place):
    index = make_index(settings(uri=uri))
    assert isinstance(index, LanceIndex)
    assert index._place._uri == place
    assert index.caps.consistency == ("strong" if place.startswith("/") else "token")


@pytest.mark.parametrize(
    "uri", ["http://bucket/a", "s3://", "s3:///a", "s3+ddb://bucket/a", "s3://b?x=1", "db://name"]
)
def test_other_uris_are_refused(uri):
    with pytest.raises(ValidationError, match=r"index\.uri must be a folder"):
        settings(uri=uri)


def test_options_of_the_store_come_from_named_variables(monkeypatch):
    named = settings(uri="s3://bucket", lancedb={"storage_env": {"aws_endpoint": "S3_ENDPOINT"}})
    monkeypatch.delenv("S3_ENDPOINT", raising=False)
    with pytest.raises(RuntimeError, match=r"index\.lancedb\.storage_env\.aws_endpoint: .*S3_END"):
        make_index(named)
    monkeypatch.setenv("S3_ENDPOINT", "http://127.0.0.1:9000")
    index = make_index(named)
    assert isinstance(index, LanceIndex)
    assert index._place._storage == {"aws_endpoint": "http://127.0.0.1:9000"}


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"lancedb": {"storage_env": {"aws_region": "REGION"}}}, "is for an object store"),
        ({"uri": "s3://b", "lancedb": {"storage_env": {"AWS_REGION": "REGION"}}}, "storage_env"),
        ({"uri": "s3://b", "lancedb": {"storage_env": {"aws_region": ""}}}, "storage_env"),
        ({"uri": "s3://b", "lancedb": {"storage_env": {"aws_region": "eu-west-1"}}}, "storage_env"),
        ({"uri": "s3://b", "lancedb": {"read_s": 7}}, "at least ten times"),
    ],
)
def test_what_makes_no_sense_is_refused(index, says):
    with pytest.raises(ValidationError, match=says):
        settings(**index)


def test_how_long_readers_lag_says_nothing_of_a_folder():
    index = make_index(settings(lancedb={"read_s": 7}))
    assert index.caps.consistency == "strong"

"""Schemas of CRDs become strict JSON schemas."""

import pytest
import yaml

from tests.k8s.crds import faults, validators


SCHEMA = {
    "type": "object",
    "properties": {
        "spec": {
            "type": "object",
            "required": ["size", "word"],
            "properties": {
                "size": {"type": "integer", "minimum": 1, "default": 1},
                "word": {"type": "string", "enum": ["a", "b"]},
                "either": {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}]},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "list": {"type": "array", "items": {"type": "object", "properties": {"x": {}}}},
            },
        },
    },
}


@pytest.fixture
def validator(tmp_path):
    versions = [
        {"name": "v1", "served": True, "schema": {"openAPIV3Schema": SCHEMA}},
        {"name": "v0", "served": False},
    ]
    crd = {"spec": {"group": "g.io", "names": {"kind": "Thing"}, "versions": versions}}
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(crd), encoding="utf-8")
    found = validators(tmp_path)
    assert list(found) == [("g.io/v1", "Thing")]
    return found["g.io/v1", "Thing"]


def _thing(**spec):
    return {"apiVersion": "g.io/v1", "kind": "Thing", "metadata": {"name": "x"}, "spec": spec}


@pytest.mark.parametrize(
    "spec",
    [
        {"word": "a"},
        {"word": "a", "size": 2, "either": "50%"},
        {"word": "a", "either": 5, "open": {"any": ["thing"]}},
        {"word": "a", "map": {"any": "key"}, "list": [{"x": 1}]},
        {"word": "a", "size": None, "nonsense": None},
    ],
)
def test_what_an_api_server_takes(validator, spec):
    assert faults(_thing(**spec), validator) == []


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({}, "$.spec:"),
        ({"word": "c"}, "$.spec.word:"),
        ({"word": "a", "size": 0}, "$.spec.size:"),
        ({"word": "a", "either": []}, "$.spec.either:"),
        ({"word": "a", "nonsense": 1}, "$.spec:"),
        ({"word": "a", "map": {"any": 1}}, "$.spec.map.any:"),
        ({"word": "a", "list": [{"y": 1}]}, "$.spec.list[0]:"),
    ],
)
def test_what_an_api_server_refuses(validator, spec, place):
    (fault,) = faults(_thing(**spec), validator)
    assert fault.startswith(place)

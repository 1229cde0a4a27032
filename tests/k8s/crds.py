"""Custom objects against the schema of their CRD, as strictly as an API server with `fieldValidation: Strict`.

KubeRay's CRDs are a megabyte each and not copied here: `KUBERAY_CRD_DIR` names a folder with them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator


KEPT = (
    *("type", "enum", "pattern", "format", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties", "multipleOf"),
    *("allOf", "anyOf", "oneOf", "not"),
)
NUMBER_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def validators(folder: Path) -> dict[tuple[str, str], Draft202012Validator]:
    """One for each served version of each CRD in a folder, by apiVersion and kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.load(path.read_text("utf-8"), Loader=yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            if version["served"]:
                key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
                schema = strict(version["schema"]["openAPIV3Schema"], root=True)
                found[key] = Draft202012Validator(schema)
    return found


def faults(obj: Mapping[str, Any], validator: Draft202012Validator) -> list[str]:
    """Where an object does not fit; nulls count as absent, as they do to an API server."""
    return [f"{one.json_path}: {one.message}" for one in validator.iter_errors(_without_nulls(obj))]


def strict(node: Mapping[str, Any], *, root: bool = False) -> dict[str, Any]:
    """The JSON schema of a structural one.

    What has a default is not required, since defaults are filled in first; unknown fields are refused
    unless the schema keeps them.
    """
    if node.get("x-kubernetes-int-or-string"):
        return NUMBER_OR_STRING
    made: dict[str, Any] = {key: node[key] for key in KEPT if key in node}
    if "items" in node:
        made["items"] = strict(node["items"])
    properties = node.get("properties", {})
    if properties:
        made["properties"] = {key: strict(value) for key, value in properties.items()}
    if root:  # of every kind, whatever its schema says
        made["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {"type": "object"}}
    required = [key for key in node.get("required", ()) if "default" not in properties.get(key, {})]
    if required:
        made["required"] = required
    if isinstance(node.get("additionalProperties"), Mapping):
        made["additionalProperties"] = strict(node["additionalProperties"])
    elif properties and not _open(node):
        made["additionalProperties"] = False
    return made


def _open(node: Mapping[str, Any]) -> bool:
    return bool(
        node.get("x-kubernetes-preserve-unknown-fields")
        or node.get("x-kubernetes-embedded-resource")
        or node.get("additionalProperties")
    )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value

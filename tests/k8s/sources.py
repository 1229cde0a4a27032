"""The manifests as they stand in the repository, unrendered, and broken versions of them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
GONE = object()
"""As a new value: take what is there away."""


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a file."""
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def pinned(package: str) -> str:
    """The version that the image has of a package."""
    text = (ROOT / "constraints.txt").read_text("utf-8")
    (version,) = re.findall(rf"^{re.escape(package)}==(.+)$", text, re.MULTILINE)
    return str(version)


def ray_service() -> dict[str, Any]:
    """The base's, with its Serve config."""
    (service,) = documents(K8S / "base" / "ray-service.yaml")
    (patch,) = documents(K8S / "base" / "serve-config.yaml")
    service["spec"] |= patch["spec"]
    return service


def everything() -> list[dict[str, Any]]:
    """The base's objects and those of the components that add some."""
    names = ("service-accounts", "volumes", "disruption-budget", "http-route")
    paths = [K8S / "base" / f"{name}.yaml" for name in names]
    paths += [K8S / "components" / "network-policy" / "network-policy.yaml"]
    paths += [K8S / "components" / "monitoring" / "pod-monitor.yaml"]
    env = {"kind": "ConfigMap", "metadata": {"name": "headrace-env"}, "data": {}}
    return [ray_service(), env, *(one for path in paths for one in documents(path))]


def changed(obj: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with other values, by path: `spec/x/0/y`, `spec/list/+` for one more element;
    `~` is a `/` in a key.
    """
    result = json.loads(
        json.dumps(obj)
    )  # not `deepcopy`: what YAML has as an alias is to be its own
    for path, value in changes.items():
        *steps, last = [
            int(step) if step.isdigit() else step.replace("~", "/") for step in path.split("/")
        ]
        here = result
        for step in steps:
            here = here.setdefault(step, {}) if isinstance(here, dict) else here[step]
        if value is GONE:
            del here[last]
        elif last == "+":
            here.append(value)
        else:
            here[last] = value
    return result


def among(objects: Sequence[Mapping[str, Any]], kind: str, changes: Mapping[str, Any]) -> list[Any]:
    """Objects with the one of a kind changed."""
    return [changed(one, changes) if one["kind"] == kind else one for one in objects]


def with_serve_config(service: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """A RayService with a changed `serveConfigV2`."""
    config = changed(yaml.safe_load(service["spec"]["serveConfigV2"]), changes)
    return changed(service, {"spec/serveConfigV2": yaml.safe_dump(config)})

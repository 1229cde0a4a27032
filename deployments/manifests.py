"""Writes `serveConfigV2` of the RayServices under `k8s/` from `config.yaml`: `python -m deployments.manifests`.

Each folder there that has an `overrides.yaml` says what is otherwise and why; an overlay's come after
the base's. A test compares what is committed with `render`, so that it cannot go stale.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from serve.section import Section


ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OVERRIDES, WRITTEN = "overrides.yaml", "serve-config.yaml"

STEP = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)((?:\[[^\]]+\])*)(?:\.|$)")
"""A key, and the names of elements in the list that it holds."""

HEADER = """\
# Written by `make manifests` from config.yaml and overrides.yaml: do not edit.
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: headrace
spec:
  serveConfigV2: |
"""


class Override(Section):
    """One value that a cluster has otherwise than `config.yaml`."""

    at: str = Field(
        pattern=r"^[A-Za-z_]",
        description="Its place: keys, and `[NAME]` in lists of what has names.",
    )
    value: Any = Field(description="What is put there.")
    why: str = Field(min_length=10, description="The reason.")


def targets() -> Iterator[tuple[Path, Sequence[Override]]]:
    """Each file that is written, with the overrides that it is made by, in order."""
    base = read(K8S / "base" / OVERRIDES)
    yield K8S / "base" / WRITTEN, base
    for path in sorted((K8S / "overlays").glob(f"*/{OVERRIDES}")):
        yield path.with_name(WRITTEN), [*base, *read(path)]


def read(path: Path) -> list[Override]:
    """The overrides of a file. Raises pydantic's ValidationError."""
    return [Override.model_validate(one) for one in yaml.safe_load(path.read_text("utf-8"))]


def overridden(config: Mapping[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of the deploy file's content with other values.

    Raises ValueError for a place that is not there, and for a value that is there already: an
    override without effect would hide a change of `config.yaml`.
    """
    result: dict[str, Any] = deepcopy(dict(config))
    for override in overrides:
        holder, last = _holder(result, _steps(override.at), override.at)
        if last in holder and holder[last] == override.value:
            raise ValueError(f"{override.at} is {override.value!r} already")
        holder[last] = deepcopy(override.value)  # others may reach into it
    return result


def render(config: Mapping[str, Any]) -> str:
    """The patch that gives the RayService this deploy file."""
    text = yaml.safe_dump(dict(config), sort_keys=False, width=100)
    return HEADER + "".join(f"    {line}\n" for line in text.splitlines())


def _steps(at: str) -> list[tuple[str, list[str]]]:
    """`a.b[x].c` as keys with the names that follow each. Raises ValueError."""
    steps = [(one[1], re.findall(r"\[([^\]]+)\]", one[2])) for one in STEP.finditer(at)]
    if ".".join(key + "".join(f"[{name}]" for name in names) for key, names in steps) != at:
        raise ValueError(f"{at!r} is not a place in the deploy file")
    return steps


def _holder(
    config: dict[str, Any], steps: list[tuple[str, list[str]]], at: str
) -> tuple[dict[str, Any], str]:
    """The mapping that a place is in, and its key there; missing mappings are made."""
    here: Any = config
    for key, names in steps[:-1]:
        here = here.setdefault(key, {}) if not names else here.get(key, [])
        for name in names:
            here = _named(here, name, at)
    key, names = steps[-1]
    if names:
        raise ValueError(f"{at} must end with a key")
    return here, key


def _named(elements: Any, name: str, at: str) -> Any:
    """The element of a list that is called so, by its name or id."""
    for one in elements:
        if name in (one.get("name"), one.get("id")):
            return one
    raise ValueError(f"{at}: there is no {name}")


def main() -> None:
    """Write the files."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text("utf-8"))
    for path, overrides in targets():
        path.write_text(render(overridden(config, overrides)), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes `docs/config.md` from the settings models: `python -m deployments.config_docs`.

A unit test compares the committed page with `render(Settings)`, so it cannot go stale.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from serve.config import Settings


PAGE = Path(__file__).parent.parent / "docs" / "config.md"

INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from serve/config: do not edit. -->

These are the `args` of the application in `config.yaml`, in the order of that file. A key that is
not listed here is refused, with its path. No value but `data_dir`
(`HEADRACE_DATA_DIR`) is read from the environment: where a secret is needed, the setting holds the name
of an environment variable.

`NAME` in a path is a name that you choose; `[]` is an element of a list. What is marked *live* can also stand in
a deployment's `user_config`, where a change holds without new replicas
([operations.md](operations.md#settings-that-change-while-it-runs)).
"""

HEADER = "| key | type | default | bounds | what it does |\n|---|---|---|---|---|\n"

SYMBOLS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "characters ≥ {}",
    "maxLength": "characters ≤ {}",
    "minItems": "elements ≥ {}",
    "maxItems": "elements ≤ {}",
    "minProperties": "names ≥ {}",
    "maxProperties": "names ≤ {}",
    "pattern": "matches `{}`",
}


def render(settings: type[BaseModel]) -> str:
    """The whole page: one table per section, depth first, in the order of the fields."""
    return INTRODUCTION + "\n## Top level\n\n" + "".join(_sections(settings, "", depth=2))


def _sections(model: type[BaseModel], path: str, depth: int) -> Iterator[str]:
    schemas = model.model_json_schema()["properties"]
    rows = [
        _row(name, info, schemas[name])
        for name, info in model.model_fields.items()
        if _nested(info.annotation) is None
    ]
    if rows:
        yield HEADER + "".join(rows)
    for name, info in model.model_fields.items():
        if (inner := _nested(info.annotation)) is not None:
            child, suffix = inner
            child_path = f"{path}.{name}{suffix}".lstrip(".")
            bounds = _bounds(schemas[name])
            yield f"\n{'#' * min(depth, 4)} `{child_path}`\n\n{_text(info)}"
            yield f" ({bounds})\n\n" if bounds else "\n\n"
            yield _default_block(info)
            yield from _sections(child, child_path, depth + 1)


def _text(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    live = isinstance(extra, Mapping) and extra.get("live")
    return f"{field.description or ''}{' *Live.*' if live else ''}"


def _nested(annotation: Any) -> tuple[type[BaseModel], str] | None:
    """The settings model inside an annotation, and how its path goes on; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    for argument in get_args(annotation):
        if isinstance(argument, type) and issubclass(argument, BaseModel):
            return argument, _suffix(annotation)
    return None


def _suffix(annotation: Any) -> str:
    """Of a mapping of sections, a list of them, or one that may be absent."""
    origin = get_origin(annotation)
    if origin is UnionType:
        return ""
    return ".NAME" if issubclass(origin, Mapping) else "[]"


def _default_block(field: FieldInfo) -> str:
    """Lists and mappings of sections have one default as a whole: shown as YAML."""
    if field.is_required() or field.default_factory is None:
        return ""
    plain = _plain(field.get_default(call_default_factory=True))
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=False, width=90)
    return f"Default (keys at their own default left out):\n\n```yaml\n{text}```\n\n"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value]


def _row(name: str, field: FieldInfo, schema: Mapping[str, Any]) -> str:
    for option in schema.get("anyOf", ()):
        if option != {"type": "null"}:  # an optional value: null is the default "none"
            schema = option
    cells = (f"`{name}`", _type(schema), _default(field), _bounds(schema), _text(field))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{word}`" for word in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if "const" in schema:
        return f"`{schema['const']}`"
    return str(schema.get("type", "any"))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value == "":
        return "empty"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | dict):
        return ", ".join(map(str, value)) or "empty"
    return f"{value:,}".replace(",", "_") if isinstance(value, int) else str(value)


def _bounds(schema: Mapping[str, Any]) -> str:
    return ", ".join(
        text.format(_number(schema[key])) for key, text in SYMBOLS.items() if key in schema
    )


def _number(value: Any) -> str:
    """Whole numbers without a fraction, long ones grouped as YAML reads them."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}".replace(",", "_") if isinstance(value, int) else str(value)


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(Settings), encoding="utf-8")


if __name__ == "__main__":
    main()

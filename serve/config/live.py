"""Settings that hold at once, in replicas that go on (docs/adr/0033): fields marked `LIVE`.

A change has the shape of Settings, in parts. What is not live is refused: it needs new replicas.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from serve.config import Settings
from serve.section import Section


class Live:
    """The settings that hold now in one process, and those that it began with."""

    def __init__(self, settings: Settings) -> None:
        self._first = settings
        self.now = settings

    def change(self, changes: Mapping[str, Any]) -> None:
        """Let `changes` hold over the settings at the start; what an earlier change said and this one
        does not is as at the start again. Raises ValueError that names the setting: nothing has changed.
        """
        self.now = laid_over(self._first, changes)


def fault(error: ValueError) -> str:
    """The setting at fault and what is wrong with it, in a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def laid_over(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with the changes in them, checked as a whole.

    A table grows by what is named and replaces that; elements of lists of sections go by `name`. Raises
    ValueError (pydantic's where a value is wrong) that names the setting.
    """
    return type(settings).model_validate(_section(settings, changes, ""))


def _section(section: Section, changes: Any, at: str) -> dict[str, Any]:
    values = {name: getattr(section, name) for name in type(section).model_fields}
    for key, change in _table(changes, at).items():
        place = f"{at}.{key}".lstrip(".")
        if key not in values:
            raise ValueError(f"{place}: there is no such setting")
        old, extra = values[key], type(section).model_fields[key].json_schema_extra
        if isinstance(extra, Mapping) and extra.get("live"):
            values[key] = {**old, **_table(change, place)} if isinstance(old, Mapping) else change
        elif isinstance(old, Section):
            values[key] = _section(old, change, place)
        elif isinstance(old, tuple) and all(hasattr(one, "name") for one in old):
            values[key] = _elements(old, change, place)
        else:
            raise ValueError(f"{place}: not a live setting; change it in `args`, for new replicas")
    return values


def _elements(old: Sequence[Any], changes: Any, at: str) -> list[Any]:
    """Sections that have names, each with what was said of it."""
    if not isinstance(changes, Sequence) or isinstance(changes, str):
        raise ValueError(f"{at}: must be a list")  # noqa: TRY004  as every other fault of a value
    said: dict[Any, dict[str, Any]] = {}
    for change in changes:
        rest = dict(_table(change, at))
        said[rest.pop("name", None)] = rest
    names = [one.name for one in old]
    if unknown := said.keys() - set(names):
        raise ValueError(f"{at}: {sorted(map(str, unknown))} are not among the names {names}")
    return [
        _section(one, said[one.name], f"{at}[{one.name}]") if one.name in said else one
        for one in old
    ]


def _table(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{at or 'the settings'}: must be a table")  # noqa: TRY004  as above
    return value

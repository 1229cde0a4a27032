"""docs/config.md is what the settings say."""

from typing import Literal

from pydantic import BaseModel, Field

from deployments.config_docs import PAGE, render
from serve.config import Settings
from serve.section import LIVE


class Leaf(BaseModel):
    size_bytes: int = Field(2048, ge=1, lt=10**6, description="How much | how big.")
    pace: int = Field(1, description="How fast.", json_schema_extra=LIVE)
    word: Literal["a", "b"] = Field(description="Which.")
    off: bool = Field(default=False, description="Whether.")
    either: tuple[int, ...] = Field((443, 8443), max_length=2, description="Some.")
    neither: tuple[str, ...] = Field((), description="Perhaps.")
    most: int | None = Field(None, ge=1, description="If any.")


class Tree(BaseModel):
    label: str = Field("", pattern="^x*$", description="What it is called.")
    leaves: dict[str, Leaf] = Field(
        default_factory=lambda: {"oak": Leaf(word="a")}, max_length=3, description="By kind."
    )
    row: tuple[Leaf, ...] = Field(min_length=1, description="In a row.")


def test_the_committed_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(Settings), "run `make docs`"


def test_a_row_shows_type_default_bounds_and_text():
    page = render(Tree)
    assert "| `size_bytes` | integer | 2_048 | ≥ 1, < 1_000_000 | How much \\| how big. |" in page
    assert "| `pace` | integer | 1 |  | How fast. *Live.* |" in page
    assert "| `word` | `a` or `b` | required |  | Which. |" in page
    assert "| `most` | integer | none | ≥ 1 | If any. |" in page
    assert "| `either` | list of integer | 443, 8443 | elements ≤ 2 | Some. |" in page
    assert "| `neither` | list of string | empty |  | Perhaps. |" in page
    assert "| `off` | boolean | false |  | Whether. |" in page
    assert "| `label` | string | empty | matches `^x*$` | What it is called. |" in page


def test_sections_carry_their_path_bounds_and_default():
    page = render(Tree)
    assert page.index("## `leaves.NAME`") < page.index("## `row[]`")
    assert "By kind. (names ≤ 3)" in page
    assert "```yaml\noak:\n  word: a\n```" in page

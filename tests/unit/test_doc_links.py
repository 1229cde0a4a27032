"""Links between our pages lead to files and headings that exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "k8s", "bench")
PAGES = sorted(
    (*ROOT.glob("*.md"), *(path for one in FOLDERS for path in (ROOT / one).rglob("*.md")))
)
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its blocks of code, whose brackets are no links and hashes no headings."""
    return FENCE.sub("", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    words = (re.sub(r"\]\([^)]*\)", "]", one) for one in HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in words}


def broken(page: Path) -> Iterator[str]:
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            yield f"{link}: there is no such file"
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            yield f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path):
    assert list(broken(page)) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text(
        "# One `two`: three\n[x](#one-two-three) [y](#four) [z](b.md) [w](https://example.com)\n"
        "```\n[q](nothing.md)\n```\n"
    )
    assert list(broken(page)) == ["#four: there is no such heading", "b.md: there is no such file"]

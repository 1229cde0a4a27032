"""deployments.sources: documents out of files, folders and dictionaries."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.sources import ID_BYTES_MAX, SourceError, documents, parts
from serve.content.documents import Document


DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def number(value: int) -> str:
    digits = DIGITS[value % 64]
    while value := value // 64:
        digits = DIGITS[value % 64] + digits
    return digits


def dictionary(folder: Path, entries: list[tuple[list[str], str]], *, packed: bool = True) -> Path:
    """A dict.org database: headwords and text of each entry."""
    text, lines = b"", []
    for headwords, entry in entries:
        raw = entry.encode()
        lines += [f"{word}\t{number(len(text))}\t{number(len(raw))}\n" for word in headwords]
        text += raw
    index = folder / "tiny.index"
    index.write_text("".join(lines), encoding="utf-8")
    if packed:
        (folder / "tiny.dict.dz").write_bytes(gzip.compress(text))
    else:
        (folder / "tiny.dict").write_bytes(text)
    return index


@pytest.mark.parametrize("packed", [True, False])
def test_a_dictionary(tmp_path, packed):
    entries = [
        (["00-database-short"], "A tiny dictionary"),
        (["ansi c", "iso c"], "ANSI C\n   A language.\n"),
        (["é"], "x" * 5000),
        (["mta"], "the first"),
        (["mta"], "the second"),
    ]
    index = dictionary(tmp_path, entries, packed=packed)
    found = list(documents([str(index)]))
    assert [one.id for one in found] == ["ANSI C", "é", "mta", "mta (2)"]
    assert found[0].text == "ANSI C\n   A language."
    assert found[0].metadata == {
        "headword": "ANSI C",
        "also": ["ansi c", "iso c"],
        "source": "tiny",
    }
    assert len(found[1].text) == 5000
    assert found[3].text == "the second"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("no tabs", "not a line"),
        ("word\tA*\tB", "base64"),
        ("word\tA\t//", "behind the end"),
    ],
)
def test_a_broken_dictionary_names_the_line(tmp_path, line, word):
    index = dictionary(tmp_path, [(["fine"], "text")])
    index.write_text(f"fine\tA\tE\n{line}\n", encoding="utf-8")
    with pytest.raises(SourceError, match=rf"tiny\.index:2: .*{word}"):
        list(documents([str(index)]))


def test_a_dictionary_without_its_text(tmp_path):
    index = dictionary(tmp_path, [(["fine"], "text")])
    (tmp_path / "tiny.dict.dz").write_bytes(b"not gzip")
    with pytest.raises(SourceError, match=r"tiny\.dict\.dz"):
        list(documents([str(index)]))
    (tmp_path / "tiny.dict.dz").unlink()
    with pytest.raises(SourceError, match="beside it"):
        list(documents([str(index)]))


def test_a_folder_gives_its_text_files_in_order(tmp_path):
    root = tmp_path / "docs"
    for name in ("b.md", "a/x.txt", "a/y.rst", "a/z.py", ".git/hidden.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}", encoding="utf-8")
    found = list(documents([str(root)]))
    assert [one.id for one in found] == ["docs/a/x.txt", "docs/a/y.rst", "docs/b.md"]
    assert found[0] == Document("docs/a/x.txt", "text of a/x.txt", {"source": "docs/a/x.txt"})


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=r"no \.md, \.rst, \.txt files"):
        list(documents([str(tmp_path)]))


def test_a_file_of_any_name_is_text(tmp_path):
    (tmp_path / "NOTES").write_bytes("\ufeffwith a mark".encode())
    assert [(one.id, one.text) for one in documents([str(tmp_path / "NOTES")])] == [
        ("NOTES", "with a mark")
    ]


def test_json_lines(tmp_path):
    rows = [{"id": "a", "text": "A", "metadata": {"n": 1}}, {"id": "b", "text": "B"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert list(documents([str(path)])) == [Document("a", "A", {"n": 1}), Document("b", "B", {})]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ('{"id": "a"}', "text must be a string"),
        ('{"id": 7, "text": "t"}', "id must be a string"),
        ('{"id": "a", "text": "t", "meta": {}}', "unknown field 'meta'"),
        ('{"id": "a", "text": "t", "metadata": [1]}', "metadata must be an object"),
        (r'{"id": "a", "text": "\ud800"}', "lone surrogate"),
        ('{"id": "first", "text": "t"}', "another document with the id 'first'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, word):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"id": "first", "text": "t"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(SourceError, match=word):
        list(documents([str(path)]))


def test_the_format_may_be_said(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text('{"id": "a", "text": "A"}\n', encoding="utf-8")
    assert [one.id for one in documents([str(path)])] == ["rows.txt"]
    assert [one.id for one in documents([str(path)], "jsonl")] == ["a"]


def test_python_topics():
    found = list(documents(["python:topics"]))
    assert len(found) > 50
    assert "exceptions" in {one.id for one in found}
    assert {tuple(one.metadata.items()) for one in found} == {(("source", "python"),)}


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SourceError, match="nowhere: no such file or folder"):
        list(documents(["nowhere"]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"latin\.txt: not UTF-8 at byte 3"):
        list(documents([str(tmp_path / "latin.txt")]))


def test_long_names_are_cut_and_stay_apart(tmp_path):
    index = dictionary(tmp_path, [(["é" * 600 + "a"], "one"), (["é" * 600 + "b"], "two")])
    ids = [one.id for one in documents([str(index)])]
    assert len(set(ids)) == 2
    assert all(len(one.encode()) <= ID_BYTES_MAX for one in ids)


def test_a_long_text_is_cut_after_a_line():
    long = Document("id", "0123456\n89\nabcdefghijklm", {"k": "v"})
    assert [(one.id, one.text) for one in parts(long, 10)] == [
        ("id#1", "0123456\n"),
        ("id#2", "89\nabcdefg"),
        ("id#3", "hijklm"),
    ]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab\n", max_size=60), st.integers(2, 12))
def test_parts_lose_nothing(text, chars_max):
    cut = list(parts(Document("id", text), chars_max))
    assert "".join(one.text for one in cut) == text
    assert all(len(one.text) <= chars_max for one in cut)
    assert len({one.id for one in cut}) == len(cut)

"""Documents for `headrace ingest`, read from files, folders and dictionaries.

Nothing here speaks HTTP. A source can be read again: the command reads each once to find faults
before anything is sent, and once to send.
"""

import gzip
import hashlib
import json
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from serve.content.documents import Document


Format = Literal["auto", "text", "dict", "jsonl"]

PYTHON_TOPICS = "python:topics"
"""The language reference that every Python carries: `pydoc_data.topics`."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst"})
"""What is taken from a folder."""

TEXT_CHARS_MAX = 1_000_000
"""Longer texts are cut into parts: the service's default `limits.document_chars_max`."""

ID_BYTES_MAX = 480
"""Of an id made here: below the service's 512, with room for the number of a part."""

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".index": "dict"}
_DIGITS = {
    digit: value
    for value, digit in enumerate(
        string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    )
}


class SourceError(Exception):
    """A source cannot be read; the message names the file and, where there is one, the line."""


def documents(paths: Sequence[str], kind: Format = "auto") -> Iterator[Document]:
    """The documents of all paths in order, ids unique over all of them.

    A path is a file, a folder (its text files, hidden ones left out) or `python:topics`.
    Raises SourceError.
    """
    seen: set[str] = set()
    for path in paths:
        for document in _read(path, kind):
            for part in parts(document):
                if part.id in seen:
                    raise SourceError(
                        f"{path}: there is another document with the id {part.id!r}; "
                        "sources that share ids need collections of their own"
                    )
                seen.add(part.id)
                yield part


def parts(document: Document, chars_max: int = TEXT_CHARS_MAX) -> Iterator[Document]:
    """The document itself, or `id#1`, `id#2`, ... cut after a line where there is one."""
    text = document.text
    if len(text) <= chars_max:
        yield document
        return
    start = number = 0
    while start < len(text):
        end = start + chars_max
        if end < len(text):
            end = text.rfind("\n", start + chars_max // 2, end) + 1 or end
        number += 1
        yield Document(f"{document.id}#{number}", text[start:end], document.metadata)
        start = end


def _read(path: str, kind: Format) -> Iterator[Document]:
    if path == PYTHON_TOPICS:
        return _python_topics()
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.is_file():
        raise SourceError(f"{path}: no such file or folder")
    chosen = _FORMATS.get(place.suffix, "text") if kind == "auto" else kind
    if chosen == "jsonl":
        return _json_lines(place)
    return _dictionary(place) if chosen == "dict" else iter([_text(place, place.name)])


def _folder(folder: Path) -> Iterator[Document]:
    """Ids are paths that start with the folder's own name."""
    root = folder.resolve()
    found = 0
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if path.suffix in TEXT_SUFFIXES and not hidden and path.is_file():
            found += 1
            yield _text(path, f"{root.name}/{inside.as_posix()}")
    if not found:
        raise SourceError(f"{folder}: no {', '.join(sorted(TEXT_SUFFIXES))} files")


def _text(path: Path, name: str) -> Document:
    return Document(_bounded(name), _decoded(path.read_bytes(), path), {"source": name})


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_document(_decoded(line, f"{path}:{number}"), f"{path}:{number}")


def _json_document(line: str, where: str) -> Document:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict) or (unknown := value.keys() - {"id", "text", "metadata"}):
        wrong = f"unknown field {min(unknown)!r}" if isinstance(value, dict) else "not an object"
        raise SourceError(f"{where}: {wrong}; a line is {{id, text, metadata}}")
    metadata = value.get("metadata") or {}
    for field in ("id", "text"):
        if not isinstance(value.get(field), str):
            raise SourceError(f"{where}: {field} must be a string")
    if not isinstance(metadata, dict):
        raise SourceError(f"{where}: metadata must be an object")
    try:
        line.encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise SourceError(f"{where}: holds a lone surrogate, which is not Unicode") from None
    return Document(value["id"], value["text"], metadata)


def _dictionary(index: Path) -> Iterator[Document]:
    """A dict.org database: `headword TAB offset TAB length` lines over one big text.

    The text is `NAME.dict` or `NAME.dict.dz`, which gzip reads. Headwords of the same entry make
    one document; a headword that comes again for another entry gets a number.
    """
    text = _dictionary_text(index)
    used: set[str] = set()
    for (start, length), headwords in _entries(index, len(text)).items():
        where = f"{index}: {headwords[0]}"
        entry = _decoded(text[start : start + length], where).strip()
        headword = _main(headwords, entry)
        name = _unused(headword, used)
        used.add(name)
        yield Document(name, entry, {"headword": headword, "also": headwords, "source": index.stem})


def _entries(index: Path, size: int) -> dict[tuple[int, int], list[str]]:
    """Place in the text -> its headwords; those that describe the database are left out."""
    entries: dict[tuple[int, int], list[str]] = {}
    with index.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{index}:{number}"
            headword, start, length = _index_line(_decoded(raw, where), where)
            if start + length > size:
                raise SourceError(f"{where}: points behind the end of the text")
            if not headword.startswith(("00-database", "00database")):
                entries.setdefault((start, length), []).append(headword)
    return entries


def _main(headwords: Sequence[str], entry: str) -> str:
    """An entry that opens with one of its headwords says how that one is written."""
    opening = entry.partition("\n")[0].strip()
    known = {headword.casefold() for headword in headwords}
    return opening if opening.casefold() in known else headwords[0]


def _dictionary_text(index: Path) -> bytes:
    plain, packed = index.with_suffix(".dict"), index.with_suffix(".dict.dz")
    try:
        return gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except FileNotFoundError:
        raise SourceError(f"{index}: neither {packed.name} nor {plain.name} beside it") from None
    except (EOFError, OSError) as error:
        raise SourceError(f"{packed}: {error}") from None


def _index_line(line: str, where: str) -> tuple[str, int, int]:
    fields = line.rstrip("\n").split("\t")
    if len(fields) < 3 or not fields[0].strip():  # noqa: PLR2004  a fourth field is allowed
        raise SourceError(f"{where}: not a line of a dictionary index")
    try:
        return fields[0].strip(), _number(fields[1]), _number(fields[2])
    except KeyError:
        raise SourceError(f"{where}: offset and length must be base64 numbers") from None


def _number(digits: str) -> int:
    """A number as dictd writes it: base64 digits, the highest first."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _unused(headword: str, used: set[str]) -> str:
    name, number = _bounded(headword), 1
    while name in used:
        number += 1
        name = f"{_bounded(headword)} ({number})"
    return name


def _python_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics  # noqa: PLC0415  700 KB that only this source needs

    for topic, text in sorted(topics.items()):
        yield Document(topic, text.strip(), {"source": "python"})


def _bounded(name: str) -> str:
    """An id of at most `ID_BYTES_MAX` bytes: a longer name ends in a hash of the whole."""
    raw = name.encode(errors="replace")
    if len(raw) <= ID_BYTES_MAX:
        return raw.decode()
    tail = hashlib.sha256(raw).hexdigest()[:16]
    return f"{raw[: ID_BYTES_MAX - 17].decode(errors='ignore')}~{tail}"


def _decoded(raw: bytes, where: Path | str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not UTF-8 at byte {error.start}") from None

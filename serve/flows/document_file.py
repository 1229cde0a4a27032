"""A file of documents for `POST /v1/jobs`: lines of JSON, each `{id, text, metadata?}`. No I/O."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from serve.config import Settings
from serve.content.documents import Document, validate_documents
from serve.errors import BadInput
from serve.flows.items import document_item
from serve.flows.models import Served
from serve.flows.sheet import Sheet
from serve.items import NewItem


FIELDS = frozenset({"id", "text", "metadata"})

PART_BYTES_MAX = 4 * 2**20
"""Of lines whose documents become items in one transaction."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a line stands in the file, in bytes."""

    start: int
    length: int


def read_document(raw: bytes, settings: Settings) -> Document:
    """One line of a file. Raises BadInput that names the field."""
    try:
        line: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The line is not valid JSON: {error}", code="invalid_json_line") from None
    if not isinstance(line, dict):
        raise BadInput("The line is not a JSON object.", code="invalid_json_line")
    unknown = sorted(line.keys() - FIELDS)
    if unknown:
        raise BadInput(f"There is no field {unknown[0][:64]!r}.", param=unknown[0][:64])
    for field in ("id", "text"):
        if not isinstance(line.get(field), str):
            raise BadInput(f"{field} must be a string.", param=field)
    metadata = line.get("metadata", {})
    if not isinstance(metadata, dict):
        raise BadInput("metadata must be an object.", param="metadata")
    document = Document(line["id"], line["text"], metadata)
    try:
        validate_documents([document], settings.limits, name="line")
    except BadInput as error:
        param = (error.param or "").partition(".")[2] or None
        raise BadInput(error.message, param=param, code=error.code) from None
    return document


class DocumentSheet(Sheet):
    """Checks a whole file and holds where its lines stand."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.spans: list[Span] = []
        self._ids: set[str] = set()

    @property
    def count(self) -> int:
        """Documents that are right."""
        return len(self.spans)

    def _enter(self, raw: bytes, start: int) -> None:
        """Raises BadInput."""
        document = read_document(raw, self._settings)
        if document.id in self._ids:
            raise BadInput("An earlier line has the same id.", param="id", code="duplicate_id")
        most = self._settings.files.lines_max
        if len(self.spans) >= most:
            self._stop("too_many_documents", f"A file may have {most} documents.")
        else:
            self._ids.add(document.id)
            self.spans.append(Span(start, len(raw)))


def parts(spans: Sequence[Span], items_max: int) -> Iterator[tuple[int, Sequence[Span]]]:
    """Consecutive lines of bounded number and bytes, with the number of the first."""
    at = 0
    while at < len(spans):
        end, room = at, PART_BYTES_MAX
        while (
            end < len(spans) and end - at < items_max and (end == at or spans[end].length <= room)
        ):
            room -= spans[end].length
            end += 1
        yield at, spans[at:end]
        at = end


def items_of(lines: Sequence[bytes], served: Served, settings: Settings) -> list[NewItem]:
    """Lines that were checked, as items. Slow: for a thread."""
    return [document_item(served, settings, read_document(raw, settings)) for raw in lines]

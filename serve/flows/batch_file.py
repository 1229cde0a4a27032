"""An OpenAI batch file: lines of JSON, each one request of `/v1/embeddings`. No I/O.

`BatchSheet` keeps of each line only where it stands.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from serve.config import Settings
from serve.errors import BadInput
from serve.flows.embed import EmbedRequest, size_of
from serve.flows.exchange import parse
from serve.flows.items import CHARS_PER_TOKEN, ITEM_TOKENS
from serve.flows.models import Models, Served
from serve.flows.sheet import Sheet
from serve.items import NewItem
from serve.records import Collection


ENDPOINT = "/v1/embeddings"

BYTES_PER_TOKEN = 8
"""A line costs as many tokens as these at least: it is read and held, whatever of it is embedded."""

CUSTOM_ID_BYTES_MAX = 512
"""Of a `custom_id`, in UTF-8: 50,000 of them are held at once; also the most of a document's id."""


def request_id(job_id: str, seq: int) -> str:
    """What one line's request is called: in the output files, and in the log."""
    return f"batch_req_{job_id.removeprefix('job_')}_{seq}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line that is right: where it stands in the file, and what it comes to."""

    custom_id: str
    start: int
    length: int
    inputs: int
    cost: float

    def item(self) -> NewItem:
        """It as an item: the text stays in the file."""
        payload = {"start": self.start, "length": self.length, "inputs": self.inputs}
        return NewItem(self.custom_id, "request", "embed", self.cost, payload)


@dataclass(frozen=True, slots=True)
class Request:
    """A line, read: what to embed, how to answer, and as what."""

    custom_id: str
    wanted: EmbedRequest
    encoding: str


def read_line(raw: bytes, settings: Settings) -> Request:
    """One line of a file. Raises BadInput that names the field and has a code of OpenAI's style."""
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The line is not valid JSON: {error}", code="invalid_json_line") from None
    if not isinstance(line, dict):
        raise BadInput("The line is not a JSON object.", code="invalid_json_line")
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _missing("custom_id", "a non-empty string")
    control = any(unicodedata.category(char) == "Cc" for char in custom_id)
    if control or len(custom_id.encode()) > CUSTOM_ID_BYTES_MAX:
        raise BadInput(
            f"custom_id may have {CUSTOM_ID_BYTES_MAX} bytes, and no control characters.",
            param="custom_id",
            code="invalid_custom_id",
        )
    if line.get("method") != "POST":
        raise BadInput("method must be POST.", param="method", code="invalid_method")
    if line.get("url") != ENDPOINT:
        raise BadInput(
            f"url must be {ENDPOINT}, the batch's endpoint.", param="url", code="invalid_url"
        )
    body = line.get("body")
    if not isinstance(body, dict):
        raise _missing("body", "a JSON object")
    try:
        wanted, encoding = parse(body, settings.limits)
    except BadInput as error:
        raise within_body(error) from None
    return Request(custom_id, wanted, encoding)


class BatchSheet(Sheet):
    """Checks a whole file and holds its entries: about 15 MB for 50,000 lines."""

    def __init__(
        self, settings: Settings, models: Models, collection: Collection | None = None
    ) -> None:
        """`collection`: where the vectors land, too; its model is then the only one."""
        super().__init__(settings)
        self.entries: list[Entry] = []
        self._models = models
        self._collection = collection
        self._served: Served | None = None
        self._ids: set[str] = set()
        self._inputs = 0

    @property
    def count(self) -> int:
        """Requests that are right."""
        return len(self.entries)

    def _enter(self, raw: bytes, start: int) -> None:
        """Raises BadInput, NotFound (model)."""
        request = read_line(raw, self._settings)
        if request.custom_id in self._ids:
            raise BadInput(
                f"custom_id {request.custom_id[:64]!r} stands on an earlier line, too.",
                param="custom_id",
                code="duplicate_custom_id",
            )
        self._check_model(request.wanted)
        rows: Sequence[Any] = request.wanted.texts or request.wanted.ids or ()
        self._inputs += len(rows)
        most = self._settings.files
        if len(self.entries) >= most.lines_max:
            self._stop("too_many_requests", f"A file may have {most.lines_max} requests.")
        elif self._inputs > most.inputs_max:
            self._stop("too_many_inputs", f"A file may have {most.inputs_max} inputs in all.")
        else:
            self._ids.add(request.custom_id)
            cost = max(_cost(request.wanted), len(raw) / BYTES_PER_TOKEN)
            self.entries.append(Entry(request.custom_id, start, len(raw), len(rows), cost))

    def _check_model(self, wanted: EmbedRequest) -> None:
        """The first line's model is the file's; vectors that land have its own length."""
        if self._served is None:
            served = self._models.find(wanted.model, param="body.model")
            if self._collection is not None and served.model.id != self._collection.model:
                raise BadInput(
                    f"The collection is of the model {self._collection.model}.",
                    param="body.model",
                    code="mismatched_model",
                )
            self._served = served
        elif wanted.model != self._served.model.id:
            raise BadInput(
                f"One model per file: the first line has {self._served.model.id}.",
                param="body.model",
                code="mismatched_model",
            )
        try:
            size = size_of(self._served, wanted)
        except BadInput as error:
            raise within_body(error) from None
        if self._collection is not None:
            if size != self._collection.dimensions:
                raise BadInput("The collection takes whole vectors.", param="body.dimensions")
            if wanted.dtype != "float":
                raise BadInput("What lands in a collection is float.", param="body.output_dtype")
            if wanted.texts is None:
                raise BadInput("What lands in a collection must be text.", param="body.input")


def within_body(error: BadInput) -> BadInput:
    """The fault of a request as the fault of a line that has it as its body."""
    param = None if error.param is None else f"body.{error.param}"
    return BadInput(error.message, param=param, code=error.code)


def done_line(request_id: str, custom_id: str, answer: Mapping[str, Any]) -> bytes:
    """A line of the output file."""
    response = {"status_code": 200, "request_id": request_id, "body": answer}
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": None}
    return orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def refused_line(request_id: str, custom_id: str, status: int, error: Mapping[str, Any]) -> bytes:
    """A line of the error file: a request that was answered with an error, in OpenAI's form."""
    response = {"status_code": status, "request_id": request_id, "body": {"error": error}}
    line = {"id": request_id, "custom_id": custom_id, "response": response, "error": None}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def failed_line(request_id: str, custom_id: str, code: str, message: str) -> bytes:
    """A line of the error file: a request that was not answered."""
    error = {"code": code, "message": message}
    line = {"id": request_id, "custom_id": custom_id, "response": None, "error": error}
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _cost(wanted: EmbedRequest) -> float:
    """Tokens, as far as they can be told from outside."""
    if wanted.texts is not None:
        tokens = sum(len(text) for text in wanted.texts) / CHARS_PER_TOKEN
        return tokens + ITEM_TOKENS * len(wanted.texts)
    rows = wanted.ids or ()
    return sum(len(row) for row in rows) + ITEM_TOKENS * len(rows)


def _missing(field: str, what: str) -> BadInput:
    return BadInput(f"{field} must be {what}.", param=field, code="missing_required_parameter")

"""Documents as they arrive, and the rules they must keep before anything is accepted."""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve.config import Limits
from serve.errors import BadInput


METADATA_KEY_CHARS_MAX = 256
"""As long as a field name in a filter may be."""

METADATA_KEYS_MAX = 256

MetadataValue = str | float | bool | Sequence[str]


@dataclass(frozen=True, slots=True)
class Document:
    """A text the user names by `id`. `metadata` comes back with every search result."""

    id: str
    text: str
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)


def validate_documents(
    documents: Sequence[Document],
    limits: Limits,
    *,
    name: str = "documents",
    count_max: int | None = None,
) -> None:
    """Refuse the request at its first fault. `name` is what the request calls its documents.

    Bounds: those of `limits` that start with `document` or `metadata`, and the constants above;
    `count_max` in place of `documents_max`. Raises BadInput whose `param` is the path of the
    fault, for example `documents[3].metadata.year`.
    """
    most = limits.documents_max if count_max is None else count_max
    if not 1 <= len(documents) <= most:
        raise BadInput(
            f"Between 1 and {most} {name} are allowed, not {len(documents)}.", param=name
        )
    seen: dict[str, int] = {}
    for position, document in enumerate(documents):
        param = f"{name}[{position}]"
        check_id(document.id, f"{param}.id", limits)
        first = seen.setdefault(document.id, position)
        if first != position:
            raise BadInput(f"{name}[{first}] has the same id.", param=f"{param}.id")
        _check_content(document, param, limits)


def check_document(document: Document, param: str, limits: Limits) -> None:
    """The same of one document, whose path in the request is `param`. Raises BadInput."""
    check_id(document.id, f"{param}.id", limits)
    _check_content(document, param, limits)


def check_id(document_id: str, param: str, limits: Limits) -> None:
    """Raises BadInput for an id that no document can have."""
    size = utf8_bytes(document_id, param)
    if not document_id.strip():
        raise BadInput("A document's id must not be empty.", param=param)
    if size > limits.document_id_bytes_max:
        raise BadInput(
            f"A document's id may have {limits.document_id_bytes_max} bytes, not {size}.",
            param=param,
        )
    if any(unicodedata.category(char) == "Cc" for char in document_id):
        raise BadInput("A document's id must not hold control characters.", param=param)


def check_metadata(metadata: Mapping[str, object], param: str, limits: Limits) -> None:
    """Raises BadInput, by its path, for what no metadata can hold."""
    if len(metadata) > METADATA_KEYS_MAX:
        raise BadInput(f"Metadata may have {METADATA_KEYS_MAX} keys.", param=param)
    for key, value in metadata.items():
        _check_key(key, param)
        _check_value(value, f"{param}.{key}")
    size = len(json.dumps(dict(metadata), ensure_ascii=False, separators=(",", ":")).encode())
    if size > limits.metadata_bytes_max and metadata:
        raise BadInput(
            f"Metadata may have {limits.metadata_bytes_max} bytes as JSON, not {size}.",
            param=param,
        )


def _check_content(document: Document, param: str, limits: Limits) -> None:
    _check_text(document.text, f"{param}.text", limits)
    check_metadata(document.metadata, f"{param}.metadata", limits)


def _check_text(text: str, param: str, limits: Limits) -> None:
    if len(text) > limits.document_chars_max:
        raise BadInput(
            f"A document may have {limits.document_chars_max} characters, not {len(text)}.",
            param=param,
            code="document_too_long",
        )
    utf8_bytes(text, param)
    if not text or text.isspace():
        raise BadInput("A document's text must not be empty.", param=param)


def _check_key(key: object, param: str) -> None:
    if not isinstance(key, str) or not 1 <= len(key) <= METADATA_KEY_CHARS_MAX:
        raise BadInput(
            f"Metadata keys must be strings of 1 to {METADATA_KEY_CHARS_MAX} characters.",
            param=param,
        )
    if key.startswith("$") or any(unicodedata.category(char) in {"Cc", "Cs"} for char in key):
        raise BadInput(
            "Metadata keys must not start with '$' or hold control characters.", param=param
        )


def _check_value(value: object, param: str) -> None:
    if isinstance(value, bool):
        return
    if isinstance(value, str):
        utf8_bytes(value, param)
    elif isinstance(value, int | float):
        _check_number(value, param)
    elif isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        for position, item in enumerate(value):
            utf8_bytes(item, f"{param}[{position}]")
    else:
        raise BadInput(
            "Metadata values must be strings, numbers, booleans or lists of strings.", param=param
        )


def _check_number(value: float, param: str) -> None:
    """Filters compare as float64, and JSON has no infinity."""
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        raise BadInput("A number must be finite and fit in 64-bit floating point.", param=param)


def utf8_bytes(text: str, param: str) -> int:
    """Length in UTF-8. Raises BadInput for a lone surrogate, which has no UTF-8 form."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadInput("It holds a lone surrogate, which is not valid Unicode.", param=param) from (
            None
        )

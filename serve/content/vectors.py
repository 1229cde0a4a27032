"""Vectors that a user has computed, as they arrive, and the rules that each of them must keep."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.config import Limits
from serve.content.documents import MetadataValue, check_id, check_metadata, utf8_bytes
from serve.errors import BadInput
from serve.records import Vector


FLOAT_BYTES = 4
NUMBERS = {int, float}
"""Types of JSON's numbers; a bool is none, though Python counts with it."""


@dataclass(frozen=True, slots=True)
class SentVector:
    """A vector that the user names by `id`, as it was sent: numbers, or the base64 of their bytes.

    `sent_at` is when it was sent, in epoch seconds; None: now.
    """

    id: str
    vector: object
    text: str = ""
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class RawVector:
    """The same, checked: float32, of any length and not of length zero. `param` is its path."""

    param: str
    id: str
    vector: Vector
    text: str
    metadata: Mapping[str, MetadataValue]
    sent_at: float | None = None


def checked(sent: SentVector, param: str, limits: Limits) -> RawVector:
    """Everything but whether it fits a collection. `param` is its path in the request.

    Ids and metadata are under the rules of documents. Raises BadInput with the path of the fault,
    for example `vectors[3].metadata.year`. Slow for long ones: for a thread.
    """
    check_id(sent.id, f"{param}.id", limits)
    most = limits.vector_text_chars_max
    if len(sent.text) > most:
        raise BadInput(
            f"A vector's text may have {most} characters, not {len(sent.text)}.",
            param=f"{param}.text",
        )
    utf8_bytes(sent.text, f"{param}.text")
    check_metadata(sent.metadata, f"{param}.metadata", limits)
    row = decoded(sent.vector, f"{param}.vector")
    return RawVector(param, sent.id, row, sent.text, sent.metadata, sent.sent_at)


def decoded(value: object, param: str) -> Vector:
    """Numbers, or the base64 of their bytes as little-endian float32, as one row.

    A number that float32 cannot hold becomes infinite: whoever checks the row refuses it.
    Raises BadInput.
    """
    if isinstance(value, str):
        return _from_base64(value, param)
    if isinstance(value, list) and value:
        return _from_numbers(value, param)
    raise BadInput(
        "A vector is a list of numbers, or the base64 of their float32 bytes, and not empty.",
        param=param,
    )


def in_base64(row: Vector) -> str:
    """What `decoded` reads."""
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode()


def _from_base64(text: str, param: str) -> Vector:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # ValueError: beyond ASCII
        raise BadInput("It is not valid base64.", param=param) from None
    if not raw or len(raw) % FLOAT_BYTES:
        raise BadInput(
            f"It has {len(raw)} bytes, which is no whole number of float32 values.", param=param
        )
    return np.frombuffer(raw, "<f4").astype(np.float32)


def _from_numbers(values: Sequence[object], param: str) -> Vector:
    if not NUMBERS.issuperset(map(type, values)):
        at = next(at for at, one in enumerate(values) if type(one) not in NUMBERS)
        raise BadInput("A vector holds numbers only.", param=f"{param}[{at}]")
    try:
        wide = np.array(values, np.float64)
    except OverflowError:  # an integer beyond every float
        raise BadInput("A number is too large.", param=param) from None
    with np.errstate(over="ignore"):
        row: Vector = wide.astype(np.float32)
    return row

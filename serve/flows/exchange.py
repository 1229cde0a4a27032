"""The body of `POST /v1/embeddings` and its answer: what the route and the lines of a batch file share."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import numpy as np

from serve.config import Limits, Model
from serve.embedding.quantise import Dtype, quantise
from serve.errors import BadInput
from serve.flows.embed import Embedded, EmbedRequest, TruncateSide


KNOWN = frozenset(
    {"model", "input", "encoding_format", "dimensions", "user", "truncate", "output_dtype"}
)


def refuse_unknown(body: Mapping[str, Any], known: frozenset[str], limits: Limits) -> None:
    """Raises BadInput for a field we do not know, if the settings say so."""
    if limits.unknown_fields == "refuse" and (unknown := body.keys() - known):
        field = min(unknown)[:64]
        raise BadInput(f"Unknown field {field!r}.", param=field)


def parse(body: Mapping[str, Any], limits: Limits) -> tuple[EmbedRequest, str]:
    """The request, checked, and the encoding of its answer. Raises BadInput that names the field."""
    refuse_unknown(body, KNOWN, limits)
    encoding = _choice(body, "encoding_format", ("float", "base64"), "float")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadInput("model must be a non-empty string.", param="model")
    dimensions = body.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise BadInput("dimensions must be an integer of at least 1.", param="dimensions")
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        raise BadInput("user must be a string.", param="user")
    side = cast("TruncateSide", _choice(body, "truncate", get_args(TruncateSide), "NONE"))
    dtype = cast("Dtype", _choice(body, "output_dtype", get_args(Dtype), "float"))
    texts, ids = _inputs(body.get("input"), limits.inputs_max)
    return EmbedRequest(model, texts, ids, dimensions, side, dtype), encoding


def answer(done: Embedded, wanted: EmbedRequest, encoding: str, model: Model) -> dict[str, Any]:
    """OpenAI's list, for orjson; `truncated` is ours, and only there when something was cut."""
    vectors = quantise(done.vectors, wanted.dtype, model.int8_spread)
    rows: Sequence[Any] = list(vectors)
    if encoding == "base64":
        flat = np.ascontiguousarray(vectors, vectors.dtype.newbyteorder("<"))
        rows = [base64.b64encode(row.tobytes()).decode() for row in flat]
    made: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": row}
            for index, row in enumerate(rows)
        ],
        "model": model.id,
        "usage": {"prompt_tokens": done.tokens, "total_tokens": done.tokens},
    }
    if done.cuts:
        made["truncated"] = [
            {"index": cut.index, "tokens": cut.tokens, "used": cut.used} for cut in done.cuts
        ]
    return made


def _inputs(value: Any, inputs_max: int) -> tuple[list[str] | None, list[list[int]] | None]:
    """Texts or token ids: exactly one of the two. The ids themselves are the tokenizer's to check,
    in its thread: a body may hold millions.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadInput("input must be a non-empty string or array.", param="input")
    if type(value[0]) is int:
        value = [value]
    if len(value) > inputs_max:
        raise BadInput(
            f"input has {len(value)} items; at most {inputs_max} are allowed.", param="input"
        )
    if isinstance(value[0], str):
        for index, text in enumerate(value):
            if not isinstance(text, str) or not text:
                raise BadInput(
                    f"input[{index}] must be a non-empty string.", param=f"input[{index}]"
                )
        return value, None
    for index, row in enumerate(value):
        if not isinstance(row, list) or not row:
            raise BadInput(
                f"input[{index}] must be a non-empty string or array of token ids, of one kind "
                "over the whole input.",
                param=f"input[{index}]",
            )
    return None, value


def _choice(body: Mapping[str, Any], field: str, words: tuple[str, ...], default: str) -> str:
    """One of `words`; null is the same as absent."""
    value = body.get(field)
    if value is None:
        return default
    if value not in words:
        raise BadInput(f"{field} must be one of {', '.join(words)}.", param=field)
    return cast("str", value)

"""`/v1/queues/{collection}`: the consumer of a queue hands its batches over, as Cloudflare delivers them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import ConfigDict, Field, WithJsonSchema

from serve.api.documents import DocumentBody
from serve.api.problems import problem_body
from serve.api.receipts import receipt
from serve.api.service import DEADLINE_PARAMETER, Asked
from serve.api.shapes import Problem, Receipt, Shape
from serve.api.vectors import VectorBody
from serve.api.wire import REF, Body, documented, read, reply, validated
from serve.content.documents import Document
from serve.content.messages import Message, Removal
from serve.content.vectors import SentVector
from serve.errors import BadInput
from serve.flows.queues import Verdict


router = APIRouter()

MESSAGES_MAX = 1000
"""The highest that `limits.queue_messages_max` may be: nothing longer is looked at."""

SENT_AT_MIN = 1e9
"""September 2001: what is before it was written in another unit than milliseconds."""

ID_CHARS_MAX = 128


class DeleteMessage(Body):
    """The body of a message that deletes a document or a vector."""

    id: str
    delete: Literal[True]


BODIES = ("DocumentBody", "VectorBody", "DeleteMessage")


class QueueMessage(Body):
    """One message, with its own `id` and the time at which the queue got it.

    `timestamp` is in ISO 8601 with an offset, as JSON has a `Date`, or in milliseconds since 1970. What else
    a queue says of a message is ignored.
    """

    model_config = ConfigDict(extra="ignore")

    id: Annotated[str, Field(min_length=1, max_length=ID_CHARS_MAX)]
    timestamp: Annotated[str, Field(max_length=64)] | float
    attempts: Annotated[int, Field(ge=1)] = 1
    body: Annotated[
        Any, WithJsonSchema({"anyOf": [{"$ref": REF.format(model=name)} for name in BODIES]})
    ]


class QueueBody(Body):
    """The messages of one batch."""

    messages: Annotated[
        list[QueueMessage], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)
    ]


class MessageVerdict(Shape):
    """What the consumer is to do with one message: `ack` it, or `retry` it after `delay_seconds`.

    `dead`: it will fail again; what is left is the queue's dead-letter queue, where retries lead.
    """

    id: str
    verdict: Literal["ack", "retry"]
    status: Literal["accepted", "indexed", "superseded", "failed"]
    delay_seconds: int | None = None
    dead: bool | None = None
    error: Problem | None = None


class QueueVerdicts(Shape):
    """One verdict a message, in their order. `receipt`: of the documents and deletes among them."""

    object: Literal["list"]
    data: list[MessageVerdict]
    retried: int
    receipt: Receipt | None = None


@router.post(
    "/v1/queues/{collection}",
    openapi_extra=documented(QueueBody, DEADLINE_PARAMETER),
    responses={200: {"model": QueueVerdicts}, 207: {"model": QueueVerdicts}},
)
async def consume_queue(collection: str, ask: Asked) -> Response:
    """Write documents and vectors, and delete, as the messages say.

    200 when all can be acknowledged, 207 when some are to be retried. An error is about the whole batch:
    nothing of it was done.
    """
    body = await read(ask.request, QueueBody)
    messages = [_message(one, at) for at, one in enumerate(body.messages)]
    done = await ask.service.queues.consume(ask.who, collection, messages, ask.until)
    data = [_shown(one.id, made) for one, made in zip(body.messages, done.verdicts, strict=True)]
    retried = sum(one["verdict"] == "retry" for one in data)
    shown: dict[str, Any] = {"object": "list", "data": data, "retried": retried}
    if done.taken is not None:
        shown["receipt"] = receipt(done.taken.job.id, done.taken.level, done.taken.documents)
    return reply(shown, 207 if retried else 200)


def _message(one: QueueMessage, at: int) -> Message:
    """Raises BadInput for its timestamp only: what is wrong with its body is its own affair."""
    sent_at = _seconds(one.timestamp, f"messages[{at}].timestamp")
    try:
        return Message(sent_at, one.attempts, _body(one.body, at, sent_at))
    except BadInput as error:
        return Message(sent_at, one.attempts, error)


def _seconds(timestamp: str | float, param: str) -> float:
    """Since the epoch. Raises BadInput."""
    if isinstance(timestamp, str):
        try:
            read_as = datetime.fromisoformat(timestamp)
        except ValueError:
            raise BadInput("It is no time in ISO 8601.", param=param) from None
        if read_as.tzinfo is None:
            raise BadInput("It has no offset, such as `Z`.", param=param)
        seconds = read_as.timestamp()
    else:
        seconds = timestamp / 1e3
    if not seconds >= SENT_AT_MIN:
        raise BadInput("It must be in milliseconds since 1970, or in ISO 8601.", param=param)
    return seconds


def _body(value: object, at: int, sent_at: float) -> Document | SentVector | Removal:
    """What a message asks for. Raises BadInput."""
    where = ("messages", at, "body")
    fields = value if isinstance(value, dict) else {}
    if "delete" in fields:
        return Removal(validated(value, DeleteMessage, *where).id)
    if "vector" in fields:
        sent = validated(value, VectorBody, *where)
        return SentVector(sent.id, sent.vector, sent.text, sent.metadata, sent_at)
    found = validated(value, DocumentBody, *where)
    return Document(found.id, found.text, found.metadata)


def _shown(message: str, verdict: Verdict) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": message, "verdict": "ack", "status": verdict.status}
    if verdict.error is not None:
        shown["verdict"] = "retry"
        shown["delay_seconds"] = verdict.delay_s
        shown["dead"] = verdict.dead
        shown["error"] = problem_body(verdict.error)
    return shown

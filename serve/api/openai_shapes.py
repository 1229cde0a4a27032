"""Replies of OpenAI's files and batches as OpenAPI shows them; see `shapes`."""

from typing import Literal

from serve.api.shapes import Shape


class FileShown(Shape):
    """A file. Times are seconds since 1970."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(Shape):
    """Files by age. The ids are null when there are none."""

    object: Literal["list"]
    data: list[FileShown]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Shape):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchFault(Shape):
    """Why a batch failed, and on which line of its file."""

    code: str
    message: str
    param: str | None
    line: int | None


class BatchFaults(Shape):
    """The first faults of a file."""

    object: Literal["list"]
    data: list[BatchFault]


class RequestCounts(Shape):
    """Requests of a batch."""

    total: int
    completed: int
    failed: int


class TokenDetails(Shape):
    """OpenAI's details, always zero here."""

    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class BatchUsage(Shape):
    """Tokens that were paid for."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class BatchShown(Shape):
    """A batch. Times are seconds since 1970; `collection` is ours."""

    id: str
    object: Literal["batch"]
    endpoint: Literal["/v1/embeddings"]
    errors: BatchFaults | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "failed",
        "in_progress",
        "finalizing",
        "completed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage
    metadata: dict[str, str]
    collection: str | None


class BatchList(Shape):
    """Batches, newest first. The ids are null when there are none."""

    object: Literal["list"]
    data: list[BatchShown]
    first_id: str | None
    last_id: str | None
    has_more: bool

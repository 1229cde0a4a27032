"""One error tree. Every failure a caller can meet is a `ServiceError` with a stable `code`.

`serve.api.problems` maps them to HTTP; `deployments.handles` turns Ray's own errors into them.
Every keyword has a default so that the classes survive pickling across a Ray handle.
"""

from typing import ClassVar


RETRY_AFTER_S_MAX = 120.0
"""OpenAI's client does not retry at all when `Retry-After` is larger than this."""


class ServiceError(Exception):
    """A failure with a message for the caller.

    Attributes:
        message: one sentence that a caller may read; never a traceback.
        param: the request field at fault, for example `input[3]`.
        code: stable machine-readable word (instance override of the class's).
        retry_after_s: seconds after which a repeat may succeed; None when waiting is pointless.
    """

    status: ClassVar[int] = 500
    code: str = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = (
            None if retry_after_s is None else min(max(retry_after_s, 0.001), RETRY_AFTER_S_MAX)
        )

    @property
    def refundable(self) -> bool:
        """Whether the caller's quota is given back: shed, or a fault of ours."""
        return self.retryable or self.status >= Internal.status

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by attributes: `Exception` alone would drop the keyword-only ones."""
        state = {
            "message": self.message,
            "param": self.param,
            "code": self.code,
            "retry_after_s": self.retry_after_s,
        }
        return type(self), (self.message,), state


class BadInput(ServiceError):
    """The request is wrong and will stay wrong."""

    status = 400
    code = "invalid_request"


class Unauthorized(ServiceError):
    """No key, or a key that is not known."""

    status = 401
    code = "invalid_api_key"


class Forbidden(ServiceError):
    """The key is known, the act is not allowed."""

    status = 403
    code = "forbidden"


class NotFound(ServiceError):
    """The named thing does not exist for this caller (also when it is another tenant's)."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class NotSatisfiable(ServiceError):
    """A `Range` that begins behind the end."""

    status = 416
    code = "range_not_satisfiable"


class Conflict(ServiceError):
    """The thing exists already, in another shape."""

    status = 409
    code = "conflict"


class Mismatch(ServiceError):
    """An idempotency key that was used with another request."""

    status = 422
    code = "idempotency_mismatch"


class TooLarge(ServiceError):
    """The body exceeds its bound."""

    status = 413
    code = "request_too_large"


class QuotaExceeded(ServiceError):
    """The tenant's own quota or queue cap is used up; `code` names the dimension."""

    status = 429
    code = "rate_limit_exceeded"
    retryable = True


class Overloaded(ServiceError):
    """The service as a whole is full."""

    status = 503
    code = "overloaded"
    retryable = True


class ModelUnavailable(ServiceError):
    """The model is not loaded, or its replica has just died."""

    status = 503
    code = "model_unavailable"
    retryable = True


class IndexUnavailable(ServiceError):
    """The vector index, or the one process that writes it, is away."""

    status = 503
    code = "index_unavailable"
    retryable = True


class StoreUnavailable(ServiceError):
    """The Store is away; nothing was accepted."""

    status = 503
    code = "store_unavailable"
    retryable = True


class LedgerUnavailable(ServiceError):
    """The Ledger (or Redis in its place) is away. Reaches a client only where it asks for queues."""

    status = 503
    code = "ledger_unavailable"
    retryable = True


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before its work was done."""

    status = 504
    code = "deadline_exceeded"
    retryable = True


class PoisonInput(ServiceError):
    """One input made the model fail, alone in its batch."""

    status = 422
    code = "input_failed"


class Internal(ServiceError):
    """A fault of ours; details are in the log under the request id."""

    status = 500
    code = "internal_error"


class Fenced(ServiceError):
    """A newer writer holds the epoch: this process must stop writing. Never reaches a client."""

    status = 503
    code = "fenced"
    retryable = True

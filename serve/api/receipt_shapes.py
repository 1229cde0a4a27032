"""A receipt that is looked up, as OpenAPI shows it."""

from serve.api.shapes import Problem, Receipt, Shape


class FailureShown(Shape):
    """A document that failed, and why."""

    id: str
    error: Problem


class ReceiptShown(Receipt):
    """A receipt as it stands now. Times are seconds since 1970; null: it has not come so far, or that
    moment was not noted. `failed` of its documents did not land; `failures` are the first of them, and
    `has_more` says that the items of the job have others.
    """

    collection: str
    failed: int
    accepted_at: float
    indexed_at: float | None
    searchable_at: float | None
    failures: list[FailureShown]
    has_more: bool

"""What a backend's write path raises and the buffer decides on. None of them reaches a client:
the writer turns them into outcomes, and the read path raises `serve.errors` directly.
"""


class IndexRetryable(Exception):
    """The whole batch may be repeated as it is: connection, timeout, throttling, commit conflict.

    Attributes:
        retry_after_s: least wait that the backend asked for.
        busy: whether fewer flushes at once may help. False: it was not the index.
    """

    def __init__(self, message: str = "", *, retry_after_s: float = 0.0, busy: bool = True) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.busy = busy


class RecordsRejected(Exception):
    """The backend refuses records for good.

    Attributes:
        pairs: (id, reason) of the refused ones, when it says which (the rest landed); None when
            it only refused the batch (nothing landed): the buffer bisects.
    """

    def __init__(
        self, message: str = "", *, pairs: tuple[tuple[str, str], ...] | None = None
    ) -> None:
        super().__init__(message)
        self.pairs = pairs


class BatchTooLarge(Exception):
    """The batch exceeds what the backend takes at once: the buffer bisects."""


class IndexOffline(Exception):
    """The index as a whole cannot be written: key, payment, missing folder, full disk.

    The buffer pauses everything and keeps it: records must not die because a key expired.
    """


IndexFault = IndexRetryable | RecordsRejected | BatchTooLarge | IndexOffline
INDEX_FAULTS = (IndexRetryable, RecordsRejected, BatchTooLarge, IndexOffline)

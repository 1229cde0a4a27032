"""What every flow of one ingress replica shares."""

import uuid
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from serve.admission.quotas import Quotas
from serve.config import Settings
from serve.flows.models import Models


@dataclass(frozen=True, slots=True)
class Context:
    """Settings, models and quotas, the threads that tokenise, and a monotonic clock.

    `wall` is seconds since the epoch, only for times that people read.
    """

    settings: Settings
    models: Models
    quotas: Quotas
    threads: Executor
    clock: Callable[[], float]
    wall: Callable[[], float]


def new_op() -> str:
    """The id of one change to the Store, so that a repeated call is applied once.

    Never the client's own request id: two requests that share it are two changes.
    """
    return uuid.uuid4().hex

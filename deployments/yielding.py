"""Work that nobody waits for at once leaves the cores to the models, where they share a machine."""

import os
from pathlib import Path


NICE = 10
"""Weighs a tenth of a model's thread. On two cores with one for the model, that thread waited for its core
13 % of the time while a job of documents ran.
"""

THREADS = Path("/proc/self/task")


def yield_cores(threads: Path = THREADS) -> None:
    """Lower the priority of every thread of this process, and of those that they will start.

    Linux counts it by thread; elsewhere nothing is done. Needs no rights, and cannot be undone without.
    """
    for one in threads.glob("[0-9]*"):
        try:
            if os.getpriority(os.PRIO_PROCESS, int(one.name)) < NICE:
                os.setpriority(os.PRIO_PROCESS, int(one.name), NICE)
        except ProcessLookupError:  # it has just ended
            continue

"""An embedder that writes down which calls it took and how each ended: in a module that replicas import."""

import os
from collections.abc import Iterator
from pathlib import Path

from deployments.embedder import Embedder
from serve import config
from serve.records import EmbedCall, EmbedReply


class Told(Embedder):
    """A line for each call's beginning and one for its end, in `data_dir/told`."""

    async def __init__(self, pool: config.Pool, settings: config.Settings) -> None:
        self._told = Path(settings.data_dir) / "told"
        await super().__init__(pool, settings)

    async def embed(self, call: EmbedCall) -> EmbedReply:
        self._tell("begun", call)
        try:
            reply = await super().embed(call)
        except BaseException as error:
            self._tell(type(error).__name__, call)
            raise
        self._tell("answered", call)
        return reply

    def _tell(self, word: str, call: EmbedCall) -> None:
        with self._told.open("a") as file:  # one write below a page: lines of replicas do not mix
            file.write(f"{os.getpid()} {call.request_id} {word}\n")


def told(settings: config.Settings) -> Iterator[tuple[int, str, str]]:
    """Process, request and word of each line."""
    for line in (Path(settings.data_dir) / "told").read_text().splitlines():
        pid, request, word = line.split()
        yield int(pid), request, word

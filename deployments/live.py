"""Serve's `user_config` as live settings: what `reconfigure` of each deployment does first."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from serve import logs
from serve.config.live import Live, fault
from serve.telemetry import Reading


log = logging.getLogger("headrace.live")


class Following:
    """The live settings of a replica, after the `user_config` that Serve has told it last."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.refused = ""

    def follow(self, user_config: Mapping[str, Any] | None) -> bool:
        """Whether it holds from now on. A wrong one is refused whole, and what held before still holds.

        It is not raised: Serve would stop a replica that works, and start one that fails the same way.
        """
        try:
            self.live.change(user_config or {})
        except ValueError as error:
            self.refused = fault(error)
            log.error("user_config is refused, what held before still holds: %s", self.refused)  # noqa: TRY400
            return False
        self.refused = ""
        logs.relevel(self.live.now.logs.level)
        log.info("live settings hold: %s", user_config)
        return True

    def readings(self) -> Iterator[Reading]:
        """Whether the last one was refused."""
        yield Reading("headrace_settings_refused", bool(self.refused))

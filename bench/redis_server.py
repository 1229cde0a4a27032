"""A `redis-server` of one's own: on 127.0.0.1, without persistence, gone when the block ends.

For benchmarks and tests. Debian's package of that name is enough.
"""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


BINARY = shutil.which("redis-server")
"""None: there is none on this machine."""

START_S_MAX = 10.0
"""It answers after 10 ms on an idle machine."""


class RedisServer:
    """One server process on a port that stays the same over kills and starts."""

    def __init__(self, folder: Path) -> None:
        """Choose a port; nothing runs yet."""
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start with empty books and wait until it answers. Raises TimeoutError."""
        if BINARY is None:
            raise FileNotFoundError("redis-server")
        options = {"bind": "127.0.0.1", "port": self.port, "save": "", "appendonly": "no"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen(
            [BINARY, *words, "--dir", self._folder],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_S_MAX
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"redis-server does not answer on port {self.port}")
            time.sleep(0.005)

    def kill(self) -> None:
        """`kill -9`, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: int) -> None:
        """Send the process a signal, for example SIGSTOP: it accepts calls and does not answer."""
        if self._process is not None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.port), 1) as s,
        ):
            s.sendall(b"PING\r\n")
            return s.recv(16).startswith(b"+PONG")
        return False


@contextlib.contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A server that runs while the block does. Raises FileNotFoundError when there is no binary."""
    with tempfile.TemporaryDirectory(prefix="headrace-redis-") as folder:
        server = RedisServer(Path(folder))
        try:
            server.start()
            yield server
        finally:
            server.kill()

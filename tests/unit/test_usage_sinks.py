"""Where usage events go: lines on stderr, files of a folder, and what is kept of those."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.usage_sinks import LOGGER, UsageFolder, on_stderr, open_sink
from serve.config import Settings, UsageEvents


NINE = 1_796_029_200.0
"""30 November 2026, 9:00 UTC."""

HOUR_S = 3600.0


class Wall:
    def __init__(self) -> None:
        self.now = NINE

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


def folder(path: Path, wall: Wall, name: str = "r/1", **rule) -> UsageFolder:
    return UsageFolder(path / "usage", UsageEvents(sink="folder", **rule), name, wall)


def names(path: Path) -> list[str]:
    return sorted(one.name for one in (path / "usage").iterdir())


def test_a_file_for_each_hour_and_process(tmp_path, wall):
    one, other = folder(tmp_path, wall), folder(tmp_path, wall, "r/2")
    one([b"a", b"b"])
    other([b"c"])
    one([b"d"])
    wall.now += HOUR_S
    one([b"e"])
    assert names(tmp_path) == [
        "2026-11-30T09-r-1.jsonl",
        "2026-11-30T09-r-2.jsonl",
        "2026-11-30T10-r-1.jsonl",
    ]
    assert (tmp_path / "usage" / "2026-11-30T09-r-1.jsonl").read_bytes() == b"a\nb\nd\n"


def test_a_file_that_was_taken_away_is_made_again(tmp_path, wall):
    one = folder(tmp_path, wall)
    one([b"a"])
    [file] = (tmp_path / "usage").iterdir()
    file.unlink()
    one([b"b"])
    assert file.read_bytes() == b"b\n"


def test_what_is_old_goes_and_so_does_what_is_too_much(tmp_path, wall, caplog):
    one = folder(tmp_path, wall, keep_days=1, bytes_max=2**20)
    lines = [b"x" * 1023] * 300
    for _ in range(5):  # of 300 KiB each, three of which fit
        one(lines)
        wall.now += HOUR_S
    assert names(tmp_path) == [f"2026-11-30T{hour}-r-1.jsonl" for hour in (10, 11, 12, 13)]
    assert caplog.text.count("usage_events.bytes_max is reached") == 1
    caplog.clear()
    wall.now = NINE + 27.5 * HOUR_S
    one(lines)
    assert names(tmp_path) == [
        "2026-11-30T12-r-1.jsonl",
        "2026-11-30T13-r-1.jsonl",
        "2026-12-01T12-r-1.jsonl",
    ]
    assert not caplog.text


def test_after_half_a_line_comes_a_whole_one(tmp_path, wall, monkeypatch):
    one = folder(tmp_path, wall)
    one([b'{"a":1}'])
    [file] = (tmp_path / "usage").iterdir()
    real = Path.open

    def torn(self, mode):
        with real(self, mode) as out:
            out.write(b'{"b":')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", torn)
        with pytest.raises(OSError, match="No space"):
            one([b'{"b":2}'])
    one([b'{"b":2}'])
    assert file.read_bytes().split(b"\n") == [b'{"a":1}', b'{"b":', b'{"b":2}', b""]


def test_lines_on_stderr_are_events_and_nothing_else(capsys):
    write = on_stderr()
    logger = logging.getLogger(LOGGER)
    try:
        write([b'{"id":"1"}', '{"id":"ü%s"}'.encode()])
    finally:
        logger.handlers = []
    assert capsys.readouterr().err == '{"id":"1"}\n{"id":"ü%s"}\n'


def test_nobody_gets_events_unless_the_settings_say_so(tmp_path):
    assert open_sink(Settings(), "a") is None
    settings = Settings(data_dir=str(tmp_path), usage_events={"sink": "folder"})
    sink = open_sink(settings, "a")
    sink([b"{}"])
    assert len(list((tmp_path / "usage").iterdir())) == 1


KILLED = """
import asyncio, sys
from pathlib import Path
from deployments.usage_sinks import UsageFolder
from serve.admission.metering import Meter, Row, UsageEvents
from serve.config import UsageEvents as Rule

async def main():
    events = UsageEvents("r")
    meter = Meter(events, UsageFolder(Path(sys.argv[1]), Rule(sink="folder"), "r", lambda: 1e9))
    row = Row("2026-11", "ann", "k", "bulk", "job_documents", "mini", "charged")
    for number in range(3):
        for _ in range(4):
            events.count(row, requests=0, tokens=1, now=1e9 + number)
        if number < 2:
            await meter.write()
    print("counted", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_kills_the_process_takes_what_was_counted_since_the_last_write(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdout.readline() == b"counted\n"
        process.send_signal(signal.SIGKILL)
    [file] = tmp_path.iterdir()
    told = [json.loads(line)["data"]["tokens"] for line in file.read_bytes().splitlines()]
    assert told == [4, 4]

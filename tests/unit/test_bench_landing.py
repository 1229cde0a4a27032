"""bench.landing_kill: when a flush is under way, and when the service has recovered."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.landing_kill import IN_A_ROW, Kills, Stream, settled, uncommitted


def put(path: Path, at: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (at, at))


def test_data_younger_than_the_newest_version_are_not_committed(tmp_path):
    assert not uncommitted(tmp_path)
    put(tmp_path / "a.lance" / "_versions" / "1.manifest", 10)
    assert not uncommitted(tmp_path)  # a table without data
    put(tmp_path / "a.lance" / "data" / "1.lance", 11)
    assert uncommitted(tmp_path)
    put(tmp_path / "a.lance" / "_versions" / "2.manifest", 12)
    assert not uncommitted(tmp_path)
    put(tmp_path / "b.lance" / "_versions" / "1.manifest", 13)
    assert not uncommitted(tmp_path)  # another table's version says nothing of this one


def test_a_kill_is_over_when_so_many_in_a_row_are_found_as_soon_as_before():
    late = [9.0, 8.0, *[0.1] * (IN_A_ROW - 2), 7.0, 6.0]
    lags = list(enumerate([*late, *[0.1] * IN_A_ROW]))
    assert settled(lags, 0.2) == len(late) - 1  # one of a row may be late
    assert settled(lags[: -IN_A_ROW + 1], 0.2) is None


def test_what_was_not_found_yet_ends_the_row():
    watch: Any = SimpleNamespace(lags_s={7: 0.1, 8: 0.2, 10: 0.3})
    client: Any = None
    stream = Stream(client, watch, Kills(), since={7: 1.0, 8: 2.0, 9: 3.0, 10: 4.0})
    assert stream.lags_s(1.5) == [(2.0, 0.2)]

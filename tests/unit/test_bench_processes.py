import subprocess
import sys
from pathlib import Path

import pytest

from bench import processes, start
from bench.processes import TICKS, Process, parse


def add(
    proc: Path, pid: int, parent: int, words: str, *, ticks: tuple[int, ...] = (0, 0, 0, 0)
) -> None:
    """A process as the kernel shows it, 100 ticks younger than the one before by its number."""
    folder = proc / str(pid)
    folder.mkdir()
    used = " ".join(map(str, ticks))
    (folder / "stat").write_text(
        f"{pid} (a ) (b) S {parent} 0 0 0 -1 0 0 0 0 0 {used} 20 0 1 0 {100 * pid} 999 888\n"
    )
    (folder / "cmdline").write_bytes(words.replace(" ", "\0").encode())
    (folder / "smaps_rollup").write_text(
        f"00400000-7fff ---p 00000000 00:00 0  [rollup]\nRss:    {1024 * pid} kB\n"
        f"Pss:    {512 * pid} kB\nPss_Dirty:  7 kB\n"
    )


@pytest.fixture
def proc(tmp_path):
    """A service of three generations, and others that are not its."""
    add(tmp_path, 1, 0, "init")
    add(tmp_path, 10, 1, "python headrace serve", ticks=(5, 6, 7, 8))
    add(tmp_path, 11, 10, "/x/raylet --y", ticks=(100, 0, 0, 0))
    add(tmp_path, 12, 11, "ray::ServeReplica:headrace:Ingress")
    add(tmp_path, 13, 11, "ray::ServeReplica:headrace:Ingress", ticks=(0, 0, 0, 50))
    add(tmp_path, 14, 1, "python other", ticks=(9999, 0, 0, 0))
    add(tmp_path, 16, 11, "python a-child-of-the-raylet")
    (tmp_path / "15").mkdir()
    (tmp_path / "self").mkdir()
    return tmp_path


def test_a_line_of_stat_is_read_behind_a_name_with_brackets(proc):
    line = (proc / "10" / "stat").read_text()
    assert parse(line) == Process(10, 1, 26 / TICKS, 1000 / TICKS)


def test_a_tree_is_a_process_and_all_that_came_of_it(proc):
    assert [one.pid for one in processes.tree(10, proc)][:2] == [10, 11]
    assert {one.pid for one in processes.tree(10, proc)} == {10, 11, 12, 13, 16}
    assert processes.tree(99, proc) == []


def test_cpu_counts_children_that_have_ended(proc):
    assert processes.cpu_s(10, proc) == pytest.approx((26 + 100 + 50) / TICKS)
    assert processes.cpu_s(99, proc) == 0


def test_memory_is_resident_and_in_proportion(proc):
    assert processes.memory(12, proc) == processes.Memory(12.0, 6.0)
    assert processes.memory(15, proc) is None
    (proc / "12" / "smaps_rollup").write_text("")
    assert processes.memory(12, proc) is None


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("ray::ServeReplica:headrace:Ingress", "ingress"),
        ("ray::StoreActor.claim", "store"),
        ("ray::DashboardAgent", "Ray: agents"),
        ("/x/ray/core/src/ray/raylet/raylet --a=/raylet_b", "Ray: raylet"),
        ("ray-dashboard-JobHead-0 (python)", "Ray: dashboard"),
        ("python -u /x/ray/_private/log_monitor.py --a", "Ray: monitors"),
        ("ray::ServeReplica:headrace:embedder-default", "embedder"),
        ("ray::ServeReplica:headrace:worker", "worker"),
        ("ray::ServeReplica:other:Thing", "other replica"),
        ("ray::IDLE", "Ray: idle worker"),
        ("ray::Stray", "Ray: other"),
        ("python -m bench.plain --port 1", None),
        ("", None),
    ],
)
def test_a_role_is_told_by_the_command_line(words, role, tmp_path):
    add(tmp_path, 7, 1, words)
    assert processes.role(7, tmp_path) == role


def test_processes_are_counted_by_role(proc):
    groups = start.count(processes.tree(10, proc), proc)
    assert groups["ingress"] == start.Group(2, 25.0, 12.5, 200 / TICKS)
    assert groups["server"] == start.Group(1, 10.0, 5.0, 0.0)
    assert groups["Ray: raylet"] == start.Group(2, 27.0, 13.5, 100 / TICKS)
    (proc / "13" / "smaps_rollup").unlink()  # it has ended meanwhile
    assert start.count(processes.tree(10, proc), proc)["ingress"].count == 1


def test_the_kernel_is_read_as_it_is():
    """A real process, which computes until it has used CPU, and its end."""
    work = "import time\nwhile time.process_time() < 0.1: pass\nprint(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"1\n"
        assert processes.cpu_s(process.pid) >= 0.1 - 2 / TICKS
        held = processes.memory(process.pid)
        assert held.rss_mb >= held.pss_mb > 1
        process.stdin.close()
    assert processes.cpu_s(process.pid) == 0


def test_cores_are_what_was_used_by_role_over_the_time_that_passed():
    before = processes.Clock(100.0, 50.0, {"store": 1.0, "gone": 3.0})
    after = processes.Clock(110.0, 65.0, {"store": 2.0, "worker": 5.0})
    assert after.cores(before) == {"machine": 1.5, "store": 0.1, "worker": 0.5}
    turns = [after.cores(before), {"store": 0.3}, {"store": 0.2, "machine": 1.0}]
    assert processes.median_cores(turns) == {"machine": 1.0, "store": 0.2, "worker": 0.0}
    now = processes.Clock.read()
    assert now.machine_s > 0
    assert now.roles_s["load program"] > 0

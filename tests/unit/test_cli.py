"""deployments.cli: commands, what they print, and their exit codes."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from click.testing import CliRunner, Result

import deployments
from deployments import cli, cli_documents, cli_operators
from deployments.client import Client
from deployments.places import Claim, Cluster, NotRunning, RayOptions, StartFailed
from serve.config import Store
from serve.errors import StoreUnavailable
from serve.flows.operators import OperatorFlow
from serve.jobs.owner import StoreOwner


CONFIG = str(Path(__file__).parents[2] / "config.yaml")


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.main, arguments, env=environment)


# --- ingest and search, against a service in memory ------------------------------------------


class Service:
    """Answers as ours does; documents whose text is `bad` are refused one by one."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.written: dict[str, str] = {}
        self.refuse: httpx.Response | Exception | None = None
        self.exists = False
        self.hits: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = orjson.loads(request.content)
        self.requests.append((request.url.path, body))
        if request.url.path == "/v1/collections":
            return httpx.Response(409 if self.exists else 201, json={})
        if isinstance(self.refuse, Exception):
            raise self.refuse
        if self.refuse is not None:
            return self.refuse
        if request.url.path.endswith("/search"):
            return httpx.Response(200, json={"object": "list", "data": self.hits})
        return self._write(body["documents"])

    def _write(self, documents: list[dict[str, Any]]) -> httpx.Response:
        rows = []
        for one in documents:
            row = {"id": one["id"], "status": "indexed", "generation": 1, "chunks": 1}
            if one["text"] == "bad":
                error = {"status": 422, "code": "input_failed", "detail": "It cannot be read."}
                row |= {"status": "failed", "chunks": 0, "error": error}
            else:
                self.written[one["id"]] = one["text"]
            rows.append(row)
        answer = {"object": "list", "data": rows, "usage": {"total_tokens": 5 * len(rows)}}
        return httpx.Response(207, json=answer)


@pytest.fixture
def service(monkeypatch) -> Service:
    made = Service()

    def client(url: str, key: str, **options: Any) -> Client:
        options |= {"sleep": lambda _s: None, "transport": httpx.MockTransport(made)}
        return Client(url, key, **options)

    monkeypatch.setattr(cli_documents, "Client", client)
    return made


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [{"id": f"d{i}", "text": "bad" if i == 3 else f"text {i}"} for i in range(5)]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_ingest_writes_all_and_sums_up(service, tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    done = run("ingest", str(tmp_path), "--collection", "c", "--key", "k", "--model", "m", "--json")
    assert done.exit_code == 0
    counts = json.loads(done.stdout)
    assert counts.pop("seconds") >= 0
    assert counts == {
        "documents": 1,
        "indexed": 1,
        "unchanged": 0,
        "failed": 0,
        "chunks": 1,
        "tokens": 5,
    }
    assert done.stderr == ""
    assert list(service.written.values()) == ["text"]
    assert service.requests[0] == ("/v1/collections", {"name": "c", "model": "m"})


def test_ingest_names_what_failed(service, rows):
    service.exists = True
    done = run("ingest", rows, "--collection", "c", "--batch", "2", HEADRACE_KEY="k")
    assert done.exit_code == 1
    assert done.stdout.startswith("4 of 5 documents indexed: 4 chunks, 25 tokens")
    assert done.stderr == "failed: d3: It cannot be read. (input_failed)\n"
    assert sorted(service.written) == ["d0", "d1", "d2", "d4"]
    assert sorted(len(body["documents"]) for _, body in service.requests[1:]) == [1, 2, 2]


def test_ingest_says_how_many_were_not_sent(service, rows):
    service.refuse = httpx.Response(401, json={"error": {"message": "No.", "code": "bad_key"}})
    done = run("ingest", rows, "--collection", "c", "--key", "k")
    assert done.exit_code == 1
    assert "stopped: 5 documents have no outcome: No. (401 bad_key, request" in done.stderr


@pytest.mark.parametrize(
    "refusal", [httpx.ConnectError("refused"), httpx.Response(503, text="overloaded")]
)
def test_ingest_without_a_service_ends_with_3(service, rows, refusal):
    service.refuse = refusal
    done = run("ingest", rows, "--collection", "c", "--key", "k")
    assert done.exit_code == 3
    assert "stopped: 5 documents have no outcome" in done.stderr


def test_ingest_finds_faults_of_the_sources_before_it_sends(service, tmp_path):
    (tmp_path / "good.txt").write_text("text", encoding="utf-8")
    done = run("ingest", str(tmp_path / "good.txt"), "nowhere", "--collection", "c", "--key", "k")
    assert done.exit_code == 2
    assert done.stderr == "Error: nowhere: no such file or folder\n"
    assert service.requests == []


def test_a_key_is_needed(service, rows):
    done = run("ingest", rows, "--collection", "c")
    assert done.exit_code == 2
    assert "--key" in done.stderr


def test_search_shows_a_table(service):
    service.hits = [{"document": "[red]d", "score": 0.51234, "text": "a\n b " * 200}]
    done = run("search", "query", "--collection", "c", "--key", "k", "--filter", '{"n": 1}')
    assert done.exit_code == 0
    assert "0.512" in done.stdout
    assert "[red]d" in done.stdout
    assert "a b a b" in done.stdout
    assert "…" in done.stdout
    path, body = service.requests[0]
    assert path == "/v1/collections/c/search"
    assert body == {"text": "query", "top_k": 5, "filter": {"n": 1}}


def test_search_as_json(service):
    service.hits = [{"document": "d", "score": 0.5, "text": "t"}]
    done = run("search", "query", "--collection", "c", "--key", "k", "--json")
    assert json.loads(done.stdout)["data"] == service.hits


def test_search_that_finds_nothing_says_so(service):
    assert run("search", "query", "--collection", "c", "--key", "k").stdout == "Nothing found.\n"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_search_with_a_bad_filter(service, text):
    done = run("search", "query", "--collection", "c", "--key", "k", "--filter", text)
    assert (done.exit_code, service.requests) == (2, [])
    assert "--filter" in done.stderr


def test_a_refusal_is_one_line(service):
    problem = {"code": "collection_not_found", "detail": "You have no collection 'c'."}
    service.refuse = httpx.Response(404, json=problem, headers={"x-request-id": "r1"})
    done = run("search", "query", "--collection", "c", "--key", "k")
    assert done.exit_code == 1
    expected = "Error: You have no collection 'c'. (404 collection_not_found, request r1)\n"
    assert done.stderr == expected


def test_search_without_a_service(service):
    service.refuse = httpx.ConnectError("refused")
    done = run("search", "query", "--collection", "c", "--key", "k")
    assert done.exit_code == 3
    assert done.stderr == "Error: http://127.0.0.1:8000 cannot be reached: refused\n"


# --- serve and keys, against a cluster that is not there -------------------------------------


class Local:
    """In place of deployments.local."""

    def __init__(self, owner: StoreOwner) -> None:
        self.events: list[str] = []
        self.environment: dict[str, str] = {}
        self.port = 0
        self.dashboard = False
        self.owner = owner
        self.broken: Exception | None = None

    @contextmanager
    def running(self, file: Any, claim: Claim, options: RayOptions) -> Iterator[str]:
        self.environment = dict(os.environ)
        self.port = file.port
        self.events.append(f"start in {options.temp_dir}")
        self.dashboard = options.dashboard
        claim.announce(Cluster("127.0.0.1:1", os.getpid(), file.url, "token"))
        try:
            yield "http://127.0.0.1:8265"
        finally:
            self.events.append("stop")

    def wait_ready(self, _file: Any, timeout_s: float, _say: Any) -> None:
        self.events.append(f"wait {timeout_s:.0f}")
        if self.broken is not None:
            raise self.broken

    @contextmanager
    def connected(self, address: str) -> Iterator[None]:
        self.environment = dict(os.environ)
        self.events.append(f"connect {address}")
        if self.broken is not None:
            raise self.broken
        yield

    def operators(self, settings: Any) -> OperatorFlow:
        return OperatorFlow(settings, self.owner, self.owner, time.time)

    def kept(self) -> list[Any]:
        return asyncio.run(self.owner.list_keys())


@pytest.fixture
def local(monkeypatch, tmp_path_factory) -> Iterator[Local]:
    owner = StoreOwner(tmp_path_factory.mktemp("store") / "store.db", Store(), time.time)
    made = Local(owner)
    before = dict(os.environ)
    monkeypatch.setitem(sys.modules, "deployments.local", made)
    monkeypatch.setattr(deployments, "local", made, raising=False)
    monkeypatch.setattr(cli, "_until_interrupted", lambda: made.events.append("serve"))
    yield made
    os.environ.clear()
    os.environ.update(before)
    owner.close()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, port: int, *more: str) -> Result:
    where = ("--config", CONFIG, "--data-dir", str(folder), "--port", str(port))
    return run("serve", *where, *more)


def test_serve_starts_waits_and_stops(local, tmp_path, port):
    done = start(tmp_path, port, "--ray-temp-dir", "/tmp/x", "--timeout", "7")  # noqa: S108
    assert done.exit_code == 0, done.output
    assert local.events == ["start in /tmp/x", "wait 7", "serve", "stop"]
    assert local.port == port
    assert local.environment["HEADRACE_DATA_DIR"] == str(tmp_path)
    assert local.environment["HF_HUB_OFFLINE"] == "1"
    assert local.environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in local.environment
    assert list(tmp_path.iterdir()) == []
    assert local.dashboard
    assert "http://127.0.0.1:8265" in done.stdout


def test_rays_dashboard_can_be_left_out(local, tmp_path, port):
    done = start(tmp_path, port, "--no-dashboard")
    assert not local.dashboard
    assert "8265" not in done.stdout
    assert "Ctrl-C stops everything." in done.stdout


def test_the_first_start_shows_keys_once_and_what_to_try(local, tmp_path, port):
    done = start(tmp_path, port)
    keys = re.findall(r"^  (\w+) +(hr_\S+)$", done.stdout, re.MULTILINE)
    assert [label for label, _ in keys] == ["free", "premium", "enterprise", "admin"]
    kept = {key.tenant: key for key in local.kept()}
    assert {tenant: (key.tier, key.role) for tenant, key in kept.items()} == {
        "demo-free": ("free", "user"),
        "demo-premium": ("premium", "user"),
        "demo-enterprise": ("enterprise", "user"),
        "operator": ("free", "admin"),
    }
    assert f"curl -sS http://127.0.0.1:{port}/v1/embeddings" in done.stdout
    assert f"-H 'Authorization: Bearer {dict(keys)['enterprise']}'" in done.stdout
    assert "ingest python:topics" in done.stdout
    again = start(tmp_path, port)
    assert "hr_" not in again.stdout
    assert "keys create --tenant NAME" in again.stdout
    assert len(local.kept()) == 4


def test_demo_keys_can_be_left_out(local, tmp_path, port):
    assert "hr_" not in start(tmp_path, port, "--no-demo-keys").stdout
    assert local.kept() == []


def test_demo_keys_do_not_come_back_after_all_were_revoked(local, tmp_path, port):
    start(tmp_path, port)
    for key in local.kept():
        asyncio.run(local.owner.revoke_key(key.id, key.id, "cli:ann@host"))
    assert "hr_" not in start(tmp_path, port).stdout
    assert local.kept() == []


def test_a_start_that_makes_a_graph_says_so_once(local, tmp_path, port, monkeypatch):
    found = start(tmp_path, port).stderr
    assert "Making an ONNX graph of all-MiniLM-L6-v2" in found
    assert str(tmp_path / "graphs") in found
    monkeypatch.setattr(cli.Graphs, "find", lambda *_: object())
    assert "graph" not in start(tmp_path, port).stderr


def test_the_fast_profile_starts_haproxy_through_our_program(local, tmp_path, port):
    assert start(tmp_path, port, "--profile", "fast").exit_code == 0
    assert local.environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    program = Path(local.environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert not program.parent.exists()  # its folder is gone with the service


def test_the_fast_profile_without_haproxy_is_one_line(local, tmp_path, port, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/nowhere")
    done = start(tmp_path, port, "--profile", "fast")
    assert (done.exit_code, local.events) == (1, [])
    assert "cannot start HAProxy: RAY_SERVE_HAPROXY_BINARY_PATH='/nowhere'" in done.stderr


def test_an_application_that_fails_ends_with_1_and_stops(local, tmp_path, port):
    local.broken = StartFailed("the application is DEPLOY_FAILED:\nno such model")
    done = start(tmp_path, port)
    assert done.exit_code == 1
    assert done.stderr.endswith("Error: the application is DEPLOY_FAILED:\nno such model\n")
    assert local.events[-1] == "stop"
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_is_said_before_ray_starts(local, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = start(tmp_path, other.getsockname()[1])
    assert done.exit_code == 1
    assert "address already in use" in done.stderr
    assert local.events == []


def test_one_cluster_per_data_folder(local, tmp_path, port):
    with Claim.take(tmp_path):
        done = start(tmp_path, port)
    assert (done.exit_code, local.events) == (1, [])
    assert "another headrace runs over" in done.stderr


@pytest.fixture
def cluster(tmp_path) -> Iterator[Path]:
    with Claim.take(tmp_path) as claim:
        claim.announce(Cluster("127.0.0.1:1", 1, "http://127.0.0.1:8000", "token"))
        yield tmp_path


def keys(*arguments: str, **environment: str) -> Result:
    return run("keys", *arguments, "--config", CONFIG, **environment)


@pytest.fixture
def operate(local, cluster):
    """A command on the cluster of the folder, as JSON; it must succeed."""

    def command(*arguments: str) -> Any:
        where = ("--config", CONFIG, "--data-dir", str(cluster), "--json")
        done = run(*arguments, *where)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return command


def test_a_key_is_made_in_the_running_cluster(local, cluster, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = keys("create", "--tenant", "acme", "--tier", "free", "--data-dir", str(cluster))
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"hr_\S+\n", done.stdout)
    assert local.events == ["connect 127.0.0.1:1"]
    assert local.environment["RAY_AUTH_MODE"] == "token"
    assert [(key.tenant, key.tier, key.role) for key in local.kept()] == [("acme", "free", "user")]


def test_a_key_from_its_making_to_its_end(operate, local):
    limits = {"interactive": {"requests_per_minute": 60}}
    made = operate(
        *("keys", "create", "--tenant", "acme", "--tier", "free", "--admin", "--name", "ci"),
        *("--limits", json.dumps(limits)),
    )
    assert made.pop("secret").startswith(f"hr_{made['id']}_")
    assert (made["role"], made["name"], made["limits"]) == ("admin", "ci", limits)
    (row,) = operate("keys", "list", "--tenant", "acme")
    assert (row["id"], row["tier"], row["expires_at"]) == (made["id"], "free", None)
    assert "secret" not in str(row)

    successor = operate("keys", "rotate", made["id"], "--overlap", "60")
    assert successor["secret"].startswith(f"hr_{successor['id']}_")
    assert successor["family"] == made["id"]
    assert len(operate("keys", "list")) == 2
    assert (
        operate("keys", "set", successor["id"], "--name", "ci 2", "--limits", "{}")["limits"] == {}
    )
    assert operate("keys", "revoke", made["id"]) == {"id": made["id"], "revoked": True}
    (row,) = operate("keys", "list")
    assert (row["id"], row["name"], row["role"]) == (successor["id"], "ci 2", "admin")


def test_all_keys_are_listed_page_by_page(operate, monkeypatch):
    monkeypatch.setattr(cli_operators, "KEYS_PAGE", 2)
    for tenant in ("beta", "acme", "beta", "acme", "acme"):
        operate("keys", "create", "--tenant", tenant, "--tier", "free")
    listed = operate("keys", "list")
    assert [row["tenant"] for row in listed] == ["acme"] * 3 + ["beta"] * 2
    ages = [row["created_at"] for row in listed]
    assert (ages[:3], ages[3:]) == (sorted(ages[:3]), sorted(ages[3:]))
    assert len({row["id"] for row in operate("keys", "list", "--tenant", "acme")}) == 3


def test_the_number_of_an_entry_is_bounded(operate):
    for number in (-1, 2**63):
        assert run("audit", "--before", str(number), "--config", CONFIG).exit_code == 2
    assert operate("audit", "--before", str(2**63 - 1)) == []


def test_tenants_and_who_changed_what(operate):
    limits = {"interactive": {"tokens_per_minute": None}, "tokens_per_month": 1000}
    new = operate("tenants", "set", "acme", "--tier", "free", "--limits", json.dumps(limits))
    assert (new["tenant"], new["tier"], new["limits"]) == ("acme", "free", limits)
    assert operate("tenants", "set", "acme", "--tier", "premium")["limits"] == limits
    operate("tenants", "set", "beta", "--tier", "free")
    assert [one["tenant"] for one in operate("tenants", "list")] == ["acme", "beta"]
    assert [one["tenant"] for one in operate("tenants", "list", "--after", "acme")] == ["beta"]
    entries = operate("audit", "--tenant", "acme")
    assert [entry["action"] for entry in entries] == ["tenant.set", "tenant.set"]
    assert re.fullmatch(r"cli:[^@]+@\S+", entries[0]["by"])
    assert operate("audit", "--before", str(entries[0]["number"])) == entries[1:]
    assert len(operate("audit", "--limit", "1")) == 1


def test_tables_are_for_people(operate, cluster):
    key = operate("keys", "create", "--tenant", "acme", "--tier", "free", "--name", "[red]")
    for command, words in (
        (("keys", "list"), [key["id"], "[red]"]),
        (("tenants", "list"), ["acme", "free"]),
        (("audit",), [key["id"], "cli:"]),
        (("keys", "set", key["id"], "--name", "b"), [key["id"], "limits of its tenant"]),
        (("tenants", "set", "acme", "--tier", "premium"), ["acme: tier premium"]),
        (("keys", "revoke", key["id"]), ["is revoked"]),
    ):
        done = run(*command, "--config", CONFIG, "--data-dir", str(cluster), COLUMNS="80")
        assert done.exit_code == 0, done.output
        assert [word for word in words if word not in done.stdout] == []
        assert key["secret"].rpartition("_")[2] not in done.stdout


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        (("keys", "create", "--tenant", "Acme!", "--tier", "free"), 2, "A tenant's name"),
        (("keys", "create", "--tenant", "acme", "--tier", "gold"), 2, "no tier 'gold'"),
        (("keys", "create", "--tenant", "acme"), 1, "needs a tier"),
        (("keys", "create", "--tenant", "acme", "--tier", "free", "--limits", "[1]"), 2, "object"),
        (("keys", "rotate", "0" * 16), 1, "no live key"),
        (("keys", "rotate", "0" * 16, "--overlap", "-1"), 2, "An overlap"),
        (("keys", "revoke", "0" * 16), 1, "not_found"),
        (("keys", "set", "0" * 16), 2, "--name or --limits"),
        (("keys", "set", "0" * 16, "--limits", '{"x": 1}'), 2, "limits.x"),
        (("tenants", "set", "acme"), 2, "--tier or --limits"),
        (("tenants", "set", "acme", "--limits", "{}"), 1, "needs a tier"),
    ],
)
def test_what_an_operator_gets_wrong(local, cluster, command, code, word):
    done = run(*command, "--config", CONFIG, "--data-dir", str(cluster))
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert word in done.stderr
    assert local.kept() == []


def test_an_operator_without_a_name_is_a_number(monkeypatch):
    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(cli_operators.getpass, "getuser", nameless)
    assert cli_operators.operator() == f"cli:{os.getuid()}@{socket.gethostname()}"


@pytest.mark.parametrize(
    ("more", "environment", "address"),
    [
        (("--address", "one:1"), {"RAY_ADDRESS": "two:2"}, "one:1"),
        ((), {"RAY_ADDRESS": "two:2"}, "two:2"),
    ],
)
def test_another_cluster_may_be_named(local, more, environment, address):
    assert keys("list", *more, **environment).exit_code == 0
    assert local.events == [f"connect {address}"]


def test_keys_without_a_cluster(local, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = keys("list", "--data-dir", str(tmp_path))
    assert (done.exit_code, local.events) == (3, [])
    assert done.stderr.startswith("Error: no headrace runs over")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (NotRunning("no Ray cluster at x"), 3, "Error: no Ray cluster at x\n"),
        (
            StoreUnavailable("The store is away."),
            1,
            "Error: The store is away. (store_unavailable)\n",
        ),
    ],
)
def test_what_goes_wrong_in_the_cluster_is_one_line(local, cluster, error, code, line):
    local.broken = error
    done = keys("list", "--data-dir", str(cluster))
    assert (done.exit_code, done.stderr) == (code, line)


def test_a_missing_deploy_file():
    done = run("keys", "list", "--config", "nowhere.yaml")
    assert done.exit_code == 1
    assert "nowhere.yaml cannot be read" in done.stderr


def test_a_deploy_file_is_checked_with_its_live_settings(tmp_path):
    done = run("check", "--config", CONFIG)
    assert (done.exit_code, done.stdout) == (0, f"{CONFIG} is right.\n")
    wrong = tmp_path / "wrong.yaml"
    live = "{name: ingress, user_config: {admission: {tiers: {free: {weight: 0}}}}}"
    wrong.write_text(f"applications: [{{deployments: [{live}]}}]", encoding="utf-8")
    done = run("check", "--config", str(wrong))
    assert done.exit_code == 1
    assert "deployments[ingress].user_config.admission.tiers.free.weight: Input" in done.stderr


def test_help_does_not_import_ray():
    code = (
        "import sys\nfrom deployments.cli import main\n"
        "main(['--help'], standalone_mode=False)\nprint('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "False"
    assert {"serve", "check", "keys", "tenants", "audit", "ingest", "search"} <= set(
        done.stdout.split()
    )

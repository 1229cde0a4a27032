"""From what waits to nodes and back, as on Kubernetes but without it: Ray's autoscaler adds fake nodes for
replicas that fit nowhere, and takes them away when those have gone.

A minute, and a Ray of its own, so it is not among the `ray` tests: `make test-nodes`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from typing import Any

import httpx
import pytest
import ray
import ray.serve

from serve.config import Batch, Pool, PoolScaling
from tests.ray.conftest import MODEL, Whole, free_port, settings_in
from tests.ray.fake_nodes import Head, running


pytestmark = [pytest.mark.nodes, pytest.mark.timeout(400)]

POOL = "embedder-default"
NODES_MAX = 2
CALLS = 8
DOCUMENTS = 60
"""Of one job. A replica's model takes about five seconds for them."""

STEP_S_MAX = 120
"""A guard: a node and a replica each start in some ten seconds."""


@dataclass(frozen=True)
class Sight:
    """What there was at one moment, looked at in this order."""

    wanted: int
    """Replicas, as our policy decided last."""
    pending: int
    running: int
    homeless: int
    """Actors that fit on no node, as Ray's autoscaler sees them."""
    nodes: int
    """Beside the head."""


@dataclass
class Town:
    """The service over a cluster that grows, the work that it was given, and what was seen of both."""

    whole: Whole
    head: Head
    admin: httpx.Client
    client: httpx.Client
    jobs: list[str] = field(default_factory=list)
    calls: list[Future[httpx.Response]] = field(default_factory=list)
    seen: list[Sight] = field(default_factory=list)

    def look(self) -> Sight:
        """What there is now; it is kept if it is new."""
        shown = self.admin.get("/v1/admin/autoscaling").raise_for_status().json()["data"]
        wanted = [one["wanted"] for one in shown if one["deployment"] == POOL]
        states = ray.serve.status().applications["headrace"].deployments[POOL].replica_states
        sight = Sight(
            sum(wanted),
            states.get("STARTING", 0),
            states.get("RUNNING", 0),
            self.head.homeless(),
            self.head.nodes(),
        )
        if self.seen[-1:] != [sight]:
            self.seen.append(sight)
        return sight

    def until(self, holds: Callable[[Sight], bool]) -> None:
        """Look until it is so; what was seen is told if it never is."""
        try:
            self.whole.until(lambda: holds(self.look()), timeout_s=STEP_S_MAX)
        except AssertionError as error:
            raise AssertionError(f"{error}; seen: {[astuple(one) for one in self.seen]}") from None

    def came(self, *steps: Callable[[Sight], bool]) -> None:
        """What was seen holds these, in this order."""
        rest = iter(self.seen)
        for number, step in enumerate(steps):
            came = any(step(one) for one in rest)
            assert came, f"step {number} is not there: {[astuple(one) for one in self.seen]}"

    def hand_over(self) -> None:
        """One more job."""
        number = len(self.jobs)
        items = [
            {"id": f"{number}-{n}", "text": f"{number} {n} words " * 40} for n in range(DOCUMENTS)
        ]
        made = self.client.post("/v1/jobs", json={"collection": "grown", "items": items})
        self.jobs.append(made.raise_for_status().json()["id"])

    def job(self, number: int) -> dict[str, Any]:
        """How far a job is."""
        shown: dict[str, Any] = (
            self.client.get(f"/v1/jobs/{self.jobs[number]}").raise_for_status().json()
        )
        return shown

    def ask(self, number: int) -> httpx.Response:
        """An interactive call that can wait for a node."""
        return self.client.post(
            "/v1/embeddings",
            json={"model": MODEL.id, "input": f"question {number}"},
            headers={"x-deadline-ms": str(STEP_S_MAX * 1000)},
            timeout=STEP_S_MAX,
        )


@pytest.fixture
def town(tmp_path) -> Iterator[Town]:
    """The service where only fake nodes have the GPU that its pool needs, and that pool sleeps."""
    assert not ray.is_initialized(), "it needs a Ray of its own: make test-nodes"
    slow = MODEL.model_copy(update={"fake_ms_per_token": 0.5})
    rule = PoolScaling(min=0, max=NODES_MAX, drain_s=2, up_s=0, down_s=1, idle_s=1)
    pool = Pool(models=(slow,), cpus=0.5, gpus=1, batch=Batch(tokens_max=512), autoscaling=rule)
    settings = settings_in(tmp_path).model_copy(update={"pools": (pool,)})
    with running({"CPU": 1, "GPU": 1}, most=NODES_MAX, idle_s=6) as head:
        ray.init(address=head.address, log_to_driver=False, configure_logging=False)
        try:
            port = free_port()
            # One proxy: those of other nodes would share the port, for their host is the same.
            ray.serve.start(proxy_location="HeadOnly", http_options={"port": port})
            whole = Whole(settings, f"http://127.0.0.1:{port}", {})
            whole.deploy(settings)
            admin = whole.key("operators", role="admin").secret
            user = whole.key("town").secret
            with whole.client(key=admin) as asking, whole.client(key=user) as client:
                yield Town(whole, head, asking, client)
            ray.serve.shutdown()
        finally:
            ray.shutdown()


def test_what_waits_brings_replicas_and_nodes_which_leave_when_it_is_done(town):
    """Order and counts only."""
    town.until(lambda now: now == Sight(0, 0, 0, 0, 0))
    town.client.post("/v1/collections", json={"name": "grown"}).raise_for_status()
    town.hand_over()
    with ThreadPoolExecutor(CALLS) as threads:
        town.calls += [threads.submit(town.ask, number) for number in range(CALLS)]
        town.until(lambda now: now.running > 0)

        def both(now: Sight) -> bool:
            if town.job(-1)["processed"]:  # what waits must not end before the second node is there
                town.hand_over()
            return now.running == NODES_MAX

        town.until(both)
    town.until(lambda _: all(town.job(n)["is_complete"] for n in range(len(town.jobs))))
    town.until(lambda now: now == Sight(0, 0, 0, 0, 0))

    town.came(
        lambda one: one.pending == 1 and one.homeless == 1 and one.nodes == 0,
        lambda one: one.pending == 1 and one.nodes == 1,
        lambda one: one.running == 1,
        lambda one: one.wanted == 2 and one.running == 1,
        lambda one: one.running == 1 and one.nodes == 2,
        lambda one: one.running == 2,
        lambda one: one.wanted == 0 and one.running == 0 and one.nodes > 0,
        lambda one: one == Sight(0, 0, 0, 0, 0),
    )
    assert all(one.running <= one.nodes <= NODES_MAX for one in town.seen)
    assert [call.result().status_code for call in town.calls] == [200] * CALLS
    done = [town.job(n) for n in range(len(town.jobs))]
    assert sum(job["succeeded"] for job in done) == DOCUMENTS * len(done)
    assert town.whole.ready()

"""The service on a real Ray cluster: what only processes that die and hand over can show."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
import ray.actor

from deployments.actors import LEDGER, NAMESPACE, STORE, UPSERTER, living, name_of
from deployments.yielding import NICE
from serve.config import Buffer
from serve.pressure import Sender
from serve.records import Record


pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

ROLES = (STORE, UPSERTER, LEDGER)


def embed(client: httpx.Client, *texts: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "fake", "input": list(texts)})


def test_what_nobody_waits_for_yields_the_cores_to_what_somebody_does(whole):
    def priorities(pids: list[int]) -> set[int]:
        return {
            os.getpriority(os.PRIO_PROCESS, int(thread.name))
            for pid in pids
            for thread in Path(f"/proc/{pid}/task").iterdir()
        }

    def actor_pids(role: str) -> list[int]:
        names = living(role)
        return [
            ray.get(ray.get_actor(name, NAMESPACE).__ray_call__.remote(lambda _: os.getpid()))
            for name in names
        ]

    yielding = [*whole.replicas("worker-items").values(), *actor_pids(UPSERTER)]
    others = [*whole.replicas("ingress").values(), *actor_pids(STORE), *actor_pids(LEDGER)]
    others += whole.replicas("embedder-default").values()
    assert len(yielding) >= 2
    # Some library's threads leave more to others of their own process.
    assert min(priorities(yielding)) == NICE
    assert min(priorities(others)) == os.getpriority(os.PRIO_PROCESS, 0) < NICE


def test_many_callers_share_batches(whole):
    before = whole.embedder_stats()
    with whole.client() as client, ThreadPoolExecutor(32) as threads:
        replies = list(threads.map(lambda n: embed(client, f"text number {n}"), range(128)))
    after = whole.embedder_stats()
    assert [reply.status_code for reply in replies] == [200] * 128
    inputs, batches = (after[word] - before[word] for word in ("inputs", "batches"))
    assert inputs == 128
    assert batches < 100  # one each would be 128
    assert replies[0].headers.get_list("x-request-id")[0]
    assert len(replies[0].headers.get_list("x-request-id")) == 1


def test_errors_keep_their_shape_across_handles(whole):
    with whole.client() as client:
        unknown = client.post("/v1/embeddings", json={"model": "nope", "input": "a"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        client.post("/v1/collections", json={"name": "twice"})
        taken = client.post("/v1/collections", json={"name": "twice"})
        assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
        assert "Traceback" not in taken.text


def test_a_departed_caller_leaves_nothing_in_the_queue(whole):
    with whole.client() as client:
        with pytest.raises(httpx.TimeoutException):
            client.post(
                "/v1/embeddings",
                json={"model": "fake", "input": ["a long text " * 30] * 500},
                headers={"x-deadline-ms": "60000"},
                timeout=1.5,
            )
        dropped = whole.embedder_stats()
        deadline = time.monotonic() + 20
        while dropped["queued_items"] and time.monotonic() < deadline:
            time.sleep(0.1)
            dropped = whole.embedder_stats()
    assert dropped["queued_items"] == 0
    assert dropped["dropped"] > 0


class Ingest:
    """Clients that write documents until told to stop, and what was acknowledged to them."""

    def __init__(self, whole, collection: str) -> None:
        self.acknowledged: dict[str, str] = {}
        self.unclear: list[str] = []
        self._whole, self._collection = whole, collection
        self._stop = threading.Event()
        with whole.client() as client:
            client.post("/v1/collections", json={"name": collection}).raise_for_status()

    def write(self, worker: int) -> None:
        with self._whole.client() as client:
            turn = 0
            while not self._stop.is_set():
                turn += 1
                self._one(client, [f"{worker}-{turn}-{n}" for n in range(4)])

    def _one(self, client: httpx.Client, ids: list[str]) -> None:
        documents = [
            {"id": one, "text": f"the text of {one}", "metadata": {"n": one}} for one in ids
        ]
        try:
            reply = client.post(
                f"/v1/collections/{self._collection}/documents", json={"documents": documents}
            )
        except httpx.TransportError as error:  # the connection broke: a clear error
            self.unclear.append(repr(error))
            return
        if reply.status_code in (200, 207):
            for one in reply.json()["data"]:
                if one["status"] == "indexed":
                    self.acknowledged[one["id"]] = f"the text of {one['id']}"
                else:
                    self.unclear.append(one["status"])
        elif reply.status_code == 202:  # it is tried again, and will land
            self.unclear.append("accepted")
        else:
            assert reply.json()["status"] in (429, 503, 504), reply.text
            self.unclear.append(reply.json()["code"])

    def around(self, kill) -> float:
        """Write, kill, write until a write is acknowledged again: how long that took."""
        with ThreadPoolExecutor(2) as threads:
            writers = [threads.submit(self.write, worker) for worker in range(2)]
            try:
                self._wait_for(20)
                kill()
                began = time.monotonic()
                self._wait_for(len(self.acknowledged) + 24)
                return time.monotonic() - began
            finally:
                self._stop.set()
                for writer in writers:
                    writer.result(timeout=90)

    def _wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 90
        while len(self.acknowledged) < count:
            assert time.monotonic() < deadline, f"stuck at {len(self.acknowledged)}"
            time.sleep(0.05)

    def missing(self) -> list[str]:
        """Acknowledged documents that a search does not find with their text."""
        gone = []
        with self._whole.client() as client:
            for one, text in self.acknowledged.items():
                reply = client.post(
                    f"/v1/collections/{self._collection}/search",
                    json={"vector": [1.0] * 32, "top_k": 2, "filter": {"n": one}},
                )
                found = [(hit["document"], hit["text"]) for hit in reply.json()["data"]]
                if found != [(one, text)]:
                    gone.append(one)
        return gone


@pytest.mark.parametrize(
    ("title", "bound_s"),
    [
        ("ray::UpserterActor", 20),
        ("ray::ServeReplica:headrace:embedder", 60),
        ("ray::StoreActor", 20),
    ],
)
def test_kill_9_in_mid_ingest_loses_nothing(whole, title, bound_s, record_property):
    ingest = Ingest(whole, f"kill-{title.rpartition(':')[2].lower()}")
    back_s = ingest.around(lambda: whole.kill(title))
    record_property("back_s", round(back_s, 1))
    whole.until(whole.ready, timeout_s=bound_s)
    assert ingest.missing() == []


@pytest.mark.timeout(240)  # two deployments
def test_a_switch_to_single_writes_drains_the_buffer_first(whole):
    before = whole.settings
    age_s = 60.0  # longer than the test waits
    gathers = Buffer(age_s_min=age_s, age_s_start=age_s, age_s_max=age_s)
    tens = before.index.model_copy(update={"max_items": 10})
    whole.deploy(before.model_copy(update={"buffer": gathers, "index": tens}))
    with whole.client() as client:
        ns = client.post("/v1/collections", json={"name": "switched"}).json()["id"]

    written = offer(whole, ns, range(25), 1)
    whole.until(lambda: counted(whole, "flushes", "depth", "in_flight") == [2, 5, 0])
    whole.deploy(before.model_copy(update={"buffer": Buffer(flush_writes_max=1)}))
    assert [one.word for one in ray.get(written, timeout=20)] == ["landed"] * 25

    assert counted(whole, "flushes", "depth") == [0, 0]
    written = offer(whole, ns, range(22, 27), 2)
    assert [one.word for one in ray.get(written, timeout=20)] == ["landed"] * 5
    assert counted(whole, "flushes") == [5]
    with whole.client() as client:
        asked = {"vector": [1.0] * 32, "top_k": 50}
        hits = client.post("/v1/collections/switched/search", json=asked).json()["data"]
    turns = sorted((hit["metadata"]["n"], hit["metadata"]["turn"]) for hit in hits)
    assert turns == [(n, 1) for n in range(22)] + [(n, 2) for n in range(22, 27)]
    whole.settings = before
    whole.delete()


def offer(whole, ns: str, numbers: range, turn: int) -> ray.ObjectRef:
    """Hand records to this deployment's Upserter; their outcomes, in the end."""
    vector = np.ones(32, np.float32)
    some = [
        Record(f"{n:032x}", f"d{n}", turn, 0, vector, metadata={"n": n, "turn": turn})
        for n in numbers
    ]
    handed = upserter(whole).offer.options(max_task_retries=0)
    return handed.remote(Sender("tenant-enterprise", 1.0), ns, some, 60.0)


def counted(whole, *words: str) -> list[float]:
    """Figures of its buffer."""
    stats = ray.get(upserter(whole).stats.remote(), timeout=20)
    return [stats[word] for word in words]


def upserter(whole) -> ray.actor.ActorHandle:
    return ray.get_actor(name_of(UPSERTER, whole.settings), NAMESPACE)


def test_a_new_deployment_takes_over_and_a_deleted_one_leaves_no_orphan(whole):
    with whole.client() as client:
        client.post("/v1/collections", json={"name": "kept"})
        document = {"id": "a", "text": "water over the wheel"}
        client.post("/v1/collections/kept/documents", json={"documents": [document]})
        old = {role: living(role) for role in ROLES}

        limits = whole.settings.limits.model_copy(update={"top_k_max": 7})
        whole.deploy(whole.settings.model_copy(update={"limits": limits}))
        for role in ROLES:
            assert living(role) == [name_of(role, whole.settings)]
            assert living(role) != old[role]

        body = {"text": "wheel", "top_k": 7}
        found = client.post("/v1/collections/kept/search", json=body)
        assert found.status_code == 200, found.text
        assert [hit["document"] for hit in found.json()["data"]] == ["a"]
        refused = client.post("/v1/collections/kept/search", json={**body, "top_k": 8})
        assert refused.status_code == 400
        document["text"] = "water under the wheel"
        again = client.post("/v1/collections/kept/documents", json={"documents": [document]})
        assert again.json()["data"][0]["generation"] == 2

    whole.delete()
    whole.until(lambda: not any(living(role) for role in ROLES), timeout_s=40)

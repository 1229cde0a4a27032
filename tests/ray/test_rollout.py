"""A new version is deployed while clients go on: nobody is refused, cut off or forgotten."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import httpx
import pytest

from serve.config import Settings
from tests.ray.told import Told, told


pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

TEXT = "a word " * 40
ITEMS = 240
PARTS = ("ingress", "embedder-default", "worker-items")


def version(settings: Settings, name: str) -> Settings:
    """Two replicas of everything, requests in slices, and a name that clients can see."""
    (pool,) = settings.pools
    model = pool.models[0].model_copy(update={"owned_by": name, "fake_ms_per_token": 0.1})
    update = {
        "pools": (pool.model_copy(update={"models": (model,), "replicas": 2}),),
        "ingress": settings.ingress.model_copy(update={"replicas": 2, "slice_tokens": 1024}),
        "workers": (settings.workers[0].model_copy(update={"replicas": 2, "items_max": 16}),),
    }
    return settings.model_copy(update=update)


@pytest.fixture
def rolling(whole):
    """The first version; what it was before comes back."""
    before = whole.settings
    whole.deploy(version(before, "first"), {"default": Told})
    yield whole
    whole.delete()
    whole.settings = before


class Clients:
    """Threads that ask again and again; what they were answered, and what was no answer."""

    def __init__(self, whole) -> None:
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self.versions: set[str] = set()
        self.accepted: list[str] = []
        self.stop = threading.Event()
        self._whole = whole

    @contextmanager
    def asking(self, *kinds: Callable[[httpx.Client], None]) -> Iterator[None]:
        """One thread of each kind."""
        with ThreadPoolExecutor(len(kinds)) as threads:
            futures = [threads.submit(self._ask, kind) for kind in kinds]
            try:
                yield
            finally:
                self.stop.set()
                for future in futures:
                    future.result(timeout=120)

    def _ask(self, kind: Callable[[httpx.Client], None]) -> None:
        with self._whole.client() as client:
            while not self.stop.is_set():
                try:
                    kind(client)
                except httpx.TransportError as error:
                    self.problems.append(f"{kind.__name__}: {error!r}")

    def _count(self, what: str, reply: httpx.Response) -> bool:
        if reply.status_code == httpx.codes.OK:
            self.done[what] += 1
            return True
        told = f"{reply.status_code} {reply.headers.get('retry-after')} {reply.text[:200]}"
        self.problems.append(f"{what}: {told}")
        return False

    def short(self, client: httpx.Client) -> None:
        """One text."""
        body = {"model": "fake", "input": "one text"}
        self._count("short", client.post("/v1/embeddings", json=body))

    def large(self, client: httpx.Client) -> None:
        """A request of slices, which go to both replicas."""
        body = {"model": "fake", "input": [TEXT] * 60}
        reply = client.post("/v1/embeddings", json=body, headers={"x-deadline-ms": "60000"})
        if self._count("large", reply):
            assert len(reply.json()["data"]) == 60

    def listed(self, client: httpx.Client) -> None:
        """Which version answers."""
        reply = client.get("/v1/models")
        if self._count("listed", reply):
            self.versions.add(reply.json()["data"][0]["owned_by"])

    def write(self, client: httpx.Client) -> None:
        """Documents, answered when the index has them, or that they are kept and will land."""
        documents = [{"id": f"w{self.done['write']}-{n}", "text": TEXT} for n in range(3)]
        reply = client.post("/v1/collections/rolled/documents", json={"documents": documents})
        if reply.status_code == httpx.codes.ACCEPTED:
            self.accepted.append(reply.json()["job"])
        elif self._count("write", reply):
            assert [one["status"] for one in reply.json()["data"]] == ["indexed"] * 3

    def follow(self, client: httpx.Client, job: str) -> list[int]:
        """A job's events to its end, as a browser reads them: again from the last one. Of snapshots only
        the first counts, which says where the reading begins.
        """
        numbers: list[int] = []
        while True:
            headers = {"last-event-id": str(numbers[-1])} if numbers else {}
            with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as reply:
                if reply.status_code == httpx.codes.NO_CONTENT:
                    return numbers
                kind = ""
                for line in reply.iter_lines():
                    word, _, value = line.partition(": ")
                    kind = value if word == "event" else kind
                    if word == "id" and (kind != "snapshot" or not numbers):
                        numbers.append(int(value))


def submit(client: httpx.Client) -> str:
    items = [{"id": f"j{n}", "text": TEXT} for n in range(ITEMS)]
    reply = client.post("/v1/jobs", json={"collection": "rolled", "items": items})
    return reply.raise_for_status().json()["id"]


def ends(client: httpx.Client, job: str) -> Counter[tuple[str, int]]:
    """How many items have ended how, after how many tries."""
    found: Counter[tuple[str, int]] = Counter()
    after: dict[str, int] = {}
    while True:
        params = {"limit": 100, **after}
        page = client.get(f"/v1/jobs/{job}/items", params=params).raise_for_status().json()
        found.update((one["state"], one["attempts"]) for one in page["data"])
        if not page["has_more"]:
            return found
        after = {"after": page["data"][-1]["seq"]}


def test_a_new_version_takes_over_and_no_request_is_lost(rolling):
    old = {part: rolling.replicas(part) for part in PARTS}
    assert all(len(found) == 2 for found in old.values())
    clients = Clients(rolling)
    with rolling.client() as client, ThreadPoolExecutor(1) as reader:
        client.post("/v1/collections", json={"name": "rolled"}).raise_for_status()
        kinds = (clients.short, clients.short, clients.large, clients.large)
        with clients.asking(*kinds, clients.listed, clients.write):
            rolling.until(lambda: min(map(clients.done.__getitem__, ("short", "write"))) > 5)
            job = submit(client)
            events: Future[list[int]] = reader.submit(partial(clients.follow, client, job))
            rolling.deploy(version(rolling.settings, "second"), {"default": Told})
            rolling.until(
                lambda: not any(old[part].keys() & rolling.replicas(part).keys() for part in PARTS)
            )
            seen = Counter(clients.done)
            rolling.until(
                lambda: all(clients.done[what] > count + 3 for what, count in seen.items())
            )
        assert clients.problems == []
        assert clients.versions == {"first", "second"}
        for accepted in (job, *clients.accepted):
            path = f"/v1/jobs/{accepted}"
            rolling.until(lambda path=path: client.get(path).json()["state"] == "completed")
        assert ends(client, job) == {("done", 0): ITEMS}
        numbers = events.result(timeout=60)
        with client.stream("GET", f"/v1/jobs/{job}/events", params={"after": 0}) as reply:
            kept = [int(line[4:]) for line in reply.iter_lines() if line.startswith("id: ")]
        assert numbers[1:] == [number for number in kept if number > numbers[0]]
        assert len(numbers) > 2
    lines = list(told(rolling.settings))
    assert {pid for pid, _, _ in lines} > set(old["embedder-default"].values())
    by_old = Counter(word for pid, _, word in lines if pid in old["embedder-default"].values())
    assert by_old["answered"] == by_old["begun"]

"""Streams of events, read as a browser reads them: over HTTP, dropped, and resumed."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from serve.config import Jobs
from serve.errors import StoreUnavailable
from serve.items import Settlement


JOBS = "/v1/jobs"


@dataclass(frozen=True)
class Read:
    """One server-sent event."""

    kind: str
    data: Any
    id: int | None
    retry: int | None


async def events(lines: AsyncIterator[str]) -> AsyncIterator[Read]:
    """What a stream's lines say."""
    fields: dict[str, str] = {}
    async for line in lines:
        if not line:
            if "event" in fields:
                yield Read(
                    fields["event"],
                    json.loads(fields["data"]),
                    int(fields["id"]) if "id" in fields else None,
                    int(fields["retry"]) if "retry" in fields else None,
                )
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


async def read_whole(client: httpx.AsyncClient, path: str, **options: Any) -> list[Read]:
    """A stream to its end."""
    answer = await client.get(path, **options)
    assert answer.status_code == 200, answer.text
    return [event async for event in events(answer.aiter_lines())]


async def submit(client: httpx.AsyncClient, count: int) -> str:
    await client.post("/v1/collections", json={"name": "docs"})
    items = [{"id": f"d{n}", "text": f"text {n}"} for n in range(count)]
    answer = await client.post(JOBS, json={"collection": "docs", "items": items})
    return answer.json()["id"]


async def end(whole: Any, count: int = 100) -> None:
    """A worker ends so many items in a second."""
    claim = await whole.store.claim("w", "prepare", count, 1e9, 0)
    whole.clock.advance(1)
    settled = [Settlement(item.id, item.lease, "done") for item in claim.items]
    assert all(await whole.store.settle(settled))


async def logged(whole: Any, job: str) -> list[int]:
    return [event.number for event in await whole.store.job_events("mighty", job, 0, 1000)]


@asynccontextmanager
async def over_http(whole: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service behind a real server."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server = uvicorn.Server(uvicorn.Config(whole.app, log_config=None, lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        headers = {"authorization": f"Bearer {whole.keys['enterprise']}"}
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, headers=headers) as client:
            yield client
        server.should_exit = True
        await serving


@asynccontextmanager
async def reading(
    http: httpx.AsyncClient, path: str, **options: Any
) -> AsyncIterator[AsyncIterator[Read]]:
    """A stream as it comes; leaving drops the connection."""
    async with http.stream("GET", path, **options) as answer:
        assert answer.status_code == 200
        async with aclosing(events(answer.aiter_lines())) as stream:
            yield stream


@pytest.fixture
async def idle(start):
    return await start(working=False)


@pytest.fixture
async def client(idle):
    return await idle.client("enterprise")


async def test_a_job_from_its_beginning_to_its_end(client, idle):
    job = await submit(client, 3)
    await end(idle, 1)
    await end(idle)
    answer = await client.get(f"{JOBS}/{job}/events?after=0")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    snapshot, *rest = [event async for event in events(answer.aiter_lines())]
    assert (snapshot.kind, snapshot.id, snapshot.retry) == ("snapshot", 0, 2000)
    assert snapshot.data == (await client.get(f"{JOBS}/{job}")).json()
    kinds = ["job.queued", "job.running", "job.progress", "job.completed"]
    assert [event.kind for event in rest] == kinds
    assert [event.id for event in rest] == await logged(idle, job)
    assert [event.data["processed"] for event in rest] == [0, 0, 1, 3]
    last = rest[-1].data
    assert {"object": "job.event", "job": job, "state": "completed"}.items() <= last.items()
    assert (last["number"], last["type"], last["progress"]) == (rest[-1].id, rest[-1].kind, 100.0)


async def test_an_ended_job_is_a_snapshot_and_then_nothing_more(client, idle):
    job = await submit(client, 1)
    await end(idle)
    (snapshot,) = await read_whole(client, f"{JOBS}/{job}/events")
    assert snapshot.data["state"] == "completed"
    again = {"last-event-id": str(snapshot.id)}
    answer = await client.get(f"{JOBS}/{job}/events", headers=again)
    assert answer.status_code == 204  # a browser stops to reconnect
    assert await read_whole(client, f"{JOBS}/{job}/events", headers={"last-event-id": "0"})


async def test_a_dropped_stream_resumes_complete(idle, client):
    job = await submit(client, 12)
    seen: list[int] = []
    path = f"{JOBS}/{job}/events"
    async with over_http(idle) as http:
        async with reading(http, f"{path}?after=0") as stream:
            assert (await anext(stream)).kind == "snapshot"
            for _ in range(4):
                seen.append((await anext(stream)).id)
                await end(idle, 1)
        for _ in range(3):  # while nobody reads
            await end(idle, 1)
        async with reading(http, path, headers={"last-event-id": str(seen[-1])}) as stream:
            snapshot = await anext(stream)
            assert (snapshot.id, snapshot.data["processed"]) == (seen[-1], 7)
            await end(idle, 2)
            await end(idle)
            seen += [event.id async for event in stream]
    assert seen == await logged(idle, job)
    assert len(seen) == len(set(seen)) > 8


async def test_events_begin_with_the_snapshot_unless_told(idle, client):
    job = await submit(client, 3)
    await end(idle, 1)
    path = f"{JOBS}/{job}/events"
    async with over_http(idle) as http, reading(http, path) as stream:
        snapshot = await anext(stream)
        assert snapshot.data["processed"] == 1
        await end(idle)
        assert [event.kind async for event in stream] == ["job.completed"]
    assert snapshot.id == (await logged(idle, job))[-2]


async def test_a_snapshot_s_number_says_nothing_of_others(idle, client):
    job = await submit(client, 1)
    path = f"{JOBS}/{job}/events"
    async with over_http(idle) as http:
        async with reading(http, path) as stream:
            before = (await anext(stream)).id
        stranger = await idle.client("other")
        assert (await stranger.post("/v1/collections", json={"name": "docs"})).status_code == 201
        await submit(stranger, 1)
        async with reading(http, path) as stream:
            assert (await anext(stream)).id == before


async def test_a_reader_that_leaves_gives_its_place_back(start):
    whole = await start(jobs=Jobs(streams_max=1), working=False)
    job = await submit(await whole.client("enterprise"), 1)
    feed, streams = whole.service.feed, whole.service.streams
    async with over_http(whole) as http:
        for path in (f"{JOBS}/{job}/events", "/v1/stats/events"):
            async with reading(http, path) as stream:
                await anext(stream)
                refused = await http.get("/v1/stats/events")
                assert (refused.status_code, refused.json()["code"]) == (429, "streams")
                assert refused.headers["retry-after"] == "120"
            while streams.count:  # noqa: ASYNC110  the server tells nobody that it has noticed
                await asyncio.sleep(0.001)
        assert not feed._listeners


async def test_a_stream_ends_by_itself(start):
    whole = await start(jobs=Jobs(stream_s=0.02), working=False)
    client = await whole.client("enterprise")
    job = await submit(client, 1)
    read = await read_whole(client, f"{JOBS}/{job}/events")
    assert [event.kind for event in read] == ["snapshot"]
    assert not whole.service.streams.count


async def test_without_the_store_a_stream_ends_and_its_reader_comes_again(client, idle):
    job = await submit(client, 1)
    idle.store.faults = {"job_events": StoreUnavailable("away")}
    (snapshot,) = await read_whole(client, f"{JOBS}/{job}/events?after=0")
    assert snapshot.kind == "snapshot"


async def test_numbers_to_resume_from_are_numbers(client):
    job = await submit(client, 1)
    for headers, query, param in (
        ({"last-event-id": "x"}, "", "Last-Event-ID"),
        ({}, "?after=1.5", "after"),
    ):
        answer = await client.get(f"{JOBS}/{job}/events{query}", headers=headers)
        assert (answer.status_code, answer.json()["param"]) == (400, param)


async def test_stats_are_told_again_and_again(start):
    whole = await start(jobs=Jobs(stream_s=0.5, stats_s=0.001), working=False)
    client = await whole.client("enterprise")
    await submit(client, 2)
    first, *rest = await read_whole(client, "/v1/stats/events")
    assert (first.kind, first.retry, first.id) == ("stats", 2000, None)
    assert first.data == (await client.get("/v1/stats")).json()
    assert first.data["uploaded"] == 2
    assert rest


async def test_operations_are_summed_by_task_and_stage(whole):
    client = await whole.client("enterprise")
    await client.post("/v1/collections", json={"name": "docs"})
    written = await client.post(
        "/v1/collections/docs/documents?wait=indexed",
        json={"documents": [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}]},
    )
    assert written.status_code == 200
    answer = (await client.get("/v1/stats/operations?days=1")).json()
    shown = {(one["task"], one["stage"]): one for one in answer["data"]}
    assert set(shown) == {("document", "prepare"), ("document", "embed")}
    for one in shown.values():
        assert (one["tries"], one["succeeded"], one["success_rate"]) == (2, 2, 1.0)
    for days in ("0", "91", "x"):
        refused = await client.get(f"/v1/stats/operations?days={days}")
        assert (refused.status_code, refused.json()["param"]) == (400, "days")

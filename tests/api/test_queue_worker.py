"""The Worker of `docs/queues.md`, as it stands there, under Node.js against the service over HTTP."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import httpx
import pytest


PAGE = Path(__file__).parents[2] / "docs" / "queues.md"
NODE = shutil.which("node")

# What Cloudflare gives a Worker: messages are no plain objects, and a first call of each counts.
DRIVER = """
import worker from "./worker.mjs";
const { env, messages } = JSON.parse(process.argv[2]);
const calls = [];
class Message {
  constructor({ id, timestamp, attempts, body }) {
    Object.defineProperties(this, {
      id: { get: () => id }, timestamp: { get: () => new Date(timestamp) },
      attempts: { get: () => attempts }, body: { get: () => body },
    });
  }
  ack() { calls.push(["ack", this.id]); }
  retry(options) { calls.push(["retry", this.id, options]); }
}
const batch = {
  queue: "documents",
  messages: messages.map((one) => new Message(one)),
  ackAll() { calls.push(["ackAll"]); },
  retryAll(options) { calls.push(["retryAll", options]); },
};
const complaints = [];
console.error = (...words) => complaints.push(words);
try { await worker.queue(batch, env); } catch (error) { calls.push(["thrown", error.name]); }
console.log(JSON.stringify({ calls, complaints }));
"""


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A folder with the Worker and what calls it."""
    if NODE is None:
        pytest.skip("node is not installed: it runs the Worker of docs/queues.md")
    folder = tmp_path_factory.mktemp("worker")
    (code,) = re.findall(r"```js\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "worker.mjs").write_text(code, encoding="utf-8")
    (folder / "driver.mjs").write_text(DRIVER, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=served.url, headers=served.headers) as client:
        client.post("/v1/collections", json={"name": "books"})
        yield client


async def deliver(folder, served, messages, **changes):
    env = {
        "HEADRACE_URL": served.url,
        "HEADRACE_KEY": served.headers["authorization"].removeprefix("Bearer "),
        "COLLECTION": "books",
        **changes,
    }
    asked = json.dumps({"env": env, "messages": messages})
    running = await asyncio.create_subprocess_exec(
        str(NODE), "driver.mjs", asked, cwd=folder, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await running.communicate()
    assert running.returncode == 0
    return json.loads(out)


def message(number, body):
    """The service of these tests has its own time of day: 14 November 2023, and some seconds."""
    return {"id": f"m{number}", "timestamp": 1_700_000_000_000, "attempts": 1, "body": body}


async def test_each_message_is_acknowledged_or_retried_as_the_reply_says(worker, served, http):
    made = await deliver(
        worker,
        served,
        [
            message(1, {"id": "a", "text": "the tide"}),
            message(2, {"text": "no id"}),
            message(3, {"id": "v", "vector": [1.0, *[0.0] * 15]}),
            message(4, {"id": "a", "vector": [1.0, *[0.0] * 15]}),
        ],
    )
    assert made["calls"] == [
        ["ack", "m1"],
        ["retry", "m2", {"delaySeconds": 0}],
        ["ack", "m3"],
        ["retry", "m4", {"delaySeconds": 10}],
    ]
    ((name, error),) = made["complaints"]
    assert (name, error["param"]) == ("m2", "messages[1].body.id")
    found = http.post("/v1/collections/books/vectors/fetch", json={"ids": ["v"]})
    assert found.json()["missing"] == []


async def test_a_batch_that_is_refused_is_retried_whole(worker, served, http):
    one = message(1, {"id": "a", "text": "the tide"})
    refused = await deliver(worker, served, [one], COLLECTION="nowhere")
    assert refused["calls"] == [["retryAll", {"delaySeconds": 60}]]
    stranger = await deliver(worker, served, [one], HEADRACE_KEY="hr_x_y")
    assert stranger["calls"] == [["retryAll", {"delaySeconds": 60}]]


async def test_a_service_that_is_away_leaves_the_batch_to_the_queue(worker, served):
    one = message(1, {"id": "a", "text": "the tide"})
    away = await deliver(worker, served, [one], HEADRACE_URL="http://127.0.0.1:9")
    assert away["calls"] == [["thrown", "TypeError"]]

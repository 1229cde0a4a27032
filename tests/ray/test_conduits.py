"""Calls that pass Ray's handles by, on a real cluster: they are used, and a rollout loses none."""

import threading
from collections import Counter

import httpx
import pytest


pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


def embed(client: httpx.Client, text: str) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": "fake", "input": text})


def test_calls_take_the_conduit(whole):
    with whole.client() as client:
        whole.until(lambda: _taken(whole, client) > 0, timeout_s=20)


def _taken(whole, client: httpx.Client) -> float:
    """Conduit calls among ten; both ingress replicas look for the embedders every two seconds."""
    before = whole.embedder_stats()["conduit_calls"]
    for n in range(10):
        embed(client, f"by conduit {n}").raise_for_status()
    return whole.embedder_stats()["conduit_calls"] - before


def test_a_rollout_of_the_embedders_loses_no_request(whole):
    stop, statuses, problems = threading.Event(), Counter(), []

    def ask(number: int) -> None:
        with whole.client() as client:
            while not stop.is_set():
                reply = embed(client, f"a text of client {number}")
                statuses[reply.status_code] += 1
                if reply.status_code != httpx.codes.OK:
                    problems.append(reply.text)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for one in clients:
        one.start()
    whole.until(lambda: statuses[200] > 40)
    pool = whole.settings.pools[0]
    batch = pool.batch.model_copy(update={"items_max": pool.batch.items_max - 1})
    changed = pool.model_copy(update={"batch": batch})
    try:
        whole.deploy(whole.settings.model_copy(update={"pools": (changed,)}))
        whole.until(lambda before=statuses[200]: statuses[200] > before + 40)
    finally:
        stop.set()
        for one in clients:
            one.join()
    assert problems == []
    assert statuses.keys() == {200}

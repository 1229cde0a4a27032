"""A canary on a real cluster: another pool's model answers, and both ingress replicas tell of it."""

import pytest

from serve.config import Canary, Pool


pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]


@pytest.fixture
def trying(whole):
    """The service with a second pool whose model answers half; what it was before comes back."""
    before = whole.settings
    (pool,) = before.pools
    new = pool.models[0].model_copy(update={"id": "fake-2"})
    other = Pool(**{**dict(pool), "name": "next", "models": (new,)})
    canary = Canary(model="fake", to="fake-2", share=0.5, shadow=0.5, same_vectors=True)
    whole.deploy(before.model_copy(update={"pools": (pool, other), "canaries": (canary,)}))
    yield whole
    whole.delete()
    whole.settings = before


def test_both_replicas_compare_and_the_ledger_adds_up(trying):
    operator = trying.key("operators", role="admin").secret
    with trying.client(key=operator) as admin, trying.client() as client:

        def shown():
            return admin.get("/v1/admin/canaries").raise_for_status().json()["data"][0]

        trying.until(lambda: shown()["state"] == "running" and shown()["replicas"] == 2)
        chosen = []
        for number in range(40):
            body = {"model": "fake", "input": f"text {number}"}
            answer = client.post("/v1/embeddings", json=body).raise_for_status()
            assert answer.json()["model"] == "fake"
            chosen.append(answer.headers["x-canary"])
        answered = chosen.count("candidate")
        assert 0 < answered < 40

        def done():
            one = shown()
            arms = {arm: one["arms"][arm]["requests"] for arm in one["arms"]}
            all_told = arms == {"stable": 40 - answered, "candidate": answered}
            return all_told and one["shadows"]["compared"] == 40 - answered

        trying.until(done)
        one = shown()
        assert (one["state"], one["fallbacks"]) == ("running", 0)
        assert one["cosine"]["inputs"] == 40 - answered
        assert one["cosine"]["min"] == pytest.approx(1, abs=1e-6)
        for arm in one["arms"].values():
            assert arm["latency_ms"]["p95"] >= arm["latency_ms"]["p50"] > 0

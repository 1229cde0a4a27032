"""deployments.local without a cluster: when a start counts as done, and as failed."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve
from ray.serve.schema import ApplicationStatus

from deployments import local
from deployments.places import DeployFile, StartFailed
from serve.config import Settings


FILE = DeployFile(
    path=None,  # type: ignore[arg-type]
    raw={"applications": [{"name": "headrace"}]},
    settings=Settings(),
)


@pytest.fixture
def looks(monkeypatch, clock) -> list[Any]:
    """What Serve says look by look, the last for ever; every look takes its time."""
    answers: list[Any] = []

    def status() -> SimpleNamespace:
        one = answers.pop(0) if len(answers) > 1 else answers[0]
        return SimpleNamespace(applications={} if one is None else {"headrace": one})

    monkeypatch.setattr(ray.serve, "status", status)
    monkeypatch.setattr(local.time, "sleep", clock.advance)
    monkeypatch.setattr(local.time, "monotonic", clock)
    return answers


def application(status: str, message: str = "") -> SimpleNamespace:
    deployments = {
        "embedder": SimpleNamespace(status=SimpleNamespace(value="HEALTHY"), message="fine"),
        "ingress": SimpleNamespace(status=SimpleNamespace(value="UPDATING"), message="no sha\n"),
    }
    return SimpleNamespace(
        status=ApplicationStatus(status), message=message, deployments=deployments
    )


@pytest.mark.parametrize(
    ("answers", "states"),
    [
        ([False, True], ["RUNNING"]),  # the second answer is followed by a look at once
        ([False, *[False] * 25, True], [None, "DEPLOYING", "RUNNING"]),
        ([True, True, True], ["DEPLOYING", "DEPLOYING", "RUNNING"]),
    ],
)
def test_it_waits_until_the_service_itself_is_ready(answers, states, looks, monkeypatch):
    monkeypatch.setattr(local, "ready", lambda _url: answers.pop(0))
    looks += [state and application(state) for state in states]
    said: list[str] = []
    local.wait_ready(FILE, 100, said.append)
    assert answers == []
    assert set(said) == {"embedder HEALTHY, ingress UPDATING"}


def test_a_service_that_starts_is_looked_at_once_a_second(looks, monkeypatch, clock):
    monkeypatch.setattr(local, "ready", lambda _url: False)
    looks += [application("DEPLOYING")]
    said: list[str] = []
    with pytest.raises(StartFailed):
        local.wait_ready(FILE, 10, said.append)
    assert 9 <= len(said) <= 11


@pytest.mark.parametrize("status", ["DEPLOY_FAILED", "UNHEALTHY"])
def test_a_broken_application_ends_the_wait_with_its_message(looks, status):
    looks += [application("DEPLOYING"), application(status, "No such model.\n")]
    with pytest.raises(
        StartFailed, match=rf"{status}: No such model\.\ningress is UPDATING: no sha$"
    ):
        local.wait_ready(FILE, 100, lambda _text: None)


def test_the_wait_is_bounded(looks, monkeypatch):
    monkeypatch.setattr(local, "ready", lambda _url: False)
    looks += [application("RUNNING")]
    with pytest.raises(StartFailed, match="not ready after 3 s"):
        local.wait_ready(FILE, 3, lambda _text: None)

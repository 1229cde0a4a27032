"""deployments.places: the deploy file, the data folder and who holds it."""

import json
import socket
from pathlib import Path

import pytest
import yaml

from deployments.places import (
    PROFILES,
    Claim,
    Cluster,
    DeployFile,
    NotRunning,
    PlaceError,
    check_port,
    find_cluster,
)


CONFIG = Path(__file__).parents[2] / "config.yaml"
CLUSTER = Cluster("127.0.0.1:6379", 42, "http://127.0.0.1:8000", "token")


def test_the_projects_own_file():
    file = DeployFile.read(CONFIG)
    assert (file.application, file.host, file.port) == ("headrace", "127.0.0.1", 8000)
    assert file.url == "http://127.0.0.1:8000"
    assert "free" in file.settings.admission.tiers


def test_another_port_leaves_the_rest_alone():
    file = DeployFile.read(CONFIG)
    moved = file.with_port(8123)
    assert moved.url == "http://127.0.0.1:8123"
    assert moved.raw["http_options"] == {**file.raw["http_options"], "port": 8123}
    assert file.port == 8000
    assert file.with_port(None) is file


@pytest.mark.parametrize(
    ("host", "url"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::", "http://[::1]:8000")],  # noqa: S104
)
def test_a_file_that_listens_everywhere_is_reached_on_loopback(tmp_path, host, url):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump({"http_options": {"host": host}, "applications": [{"args": {}}]}),
        encoding="utf-8",
    )
    assert DeployFile.read(path).url == url


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("[]", "exactly one application"),
        ("applications: []", "exactly one application"),
        ("applications: [{args: {ingress: {replicas: 0}}}]", r"args\.ingress\.replicas: "),
        ("applications: [{args: {nonsense: 0}}]", r"args\.nonsense: "),
        ("{http_options: {port: a}, applications: [{}]}", "port must be a number"),
        (
            "applications: [{deployments: [{name: ingress, user_config: {logs: {level: loud}}}]}]",
            r"deployments\[ingress\]\.user_config\.logs\.level: Input",
        ),
        (
            "applications: [{deployments: [{name: worker-items, user_config: {jobs: {}, store: {path: a}}}]}]",
            r"deployments\[worker-items\]\.user_config\.store\.path: not a live setting",
        ),
    ],
)
def test_a_bad_file_is_explained(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlaceError, match=message):
        DeployFile.read(path)


def test_the_data_folder_is_absolute_and_can_be_chosen(tmp_path, monkeypatch):
    file = DeployFile.read(CONFIG)
    monkeypatch.chdir(tmp_path)
    assert file.data_dir(None) == tmp_path / "data"
    monkeypatch.setenv("HEADRACE_DATA_DIR", "/srv/environment")
    assert file.data_dir(None) == Path("/srv/environment")
    assert file.data_dir("/srv/chosen") == Path("/srv/chosen")


def test_a_taken_port_is_said_with_its_number():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PlaceError, match=f"127.0.0.1:{port}: address already in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_cluster_is_found_while_it_runs(tmp_path):
    folder = tmp_path / "new" / "data"
    with Claim.take(folder) as claim:
        with pytest.raises(NotRunning, match="still starting"):
            find_cluster(folder)
        claim.announce(CLUSTER)
        assert find_cluster(folder) == CLUSTER
        with pytest.raises(PlaceError, match="another headrace runs over"), Claim.take(folder):
            pass
        assert find_cluster(folder) == CLUSTER
    assert list(folder.iterdir()) == []
    with pytest.raises(NotRunning):
        find_cluster(folder)


def test_what_a_killed_cluster_left_is_not_believed(tmp_path):
    (tmp_path / "cluster.json").write_text(json.dumps({"address": "a"}), encoding="utf-8")
    with pytest.raises(NotRunning, match="no headrace runs over"):
        find_cluster(tmp_path)
    with Claim.take(tmp_path) as claim:
        claim.announce(CLUSTER)
        assert find_cluster(tmp_path) == CLUSTER


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(PlaceError, match="cannot be written"), Claim.take(tmp_path / "data"):
        pass


def test_only_the_fast_profile_changes_ray():
    assert PROFILES["default"] == {}
    assert PROFILES["fast"]["RAY_SERVE_ENABLE_HA_PROXY"] == "1"

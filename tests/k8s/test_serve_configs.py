"""`serveConfigV2` of every overlay: config.yaml but for the overrides that say why, and what Ray Serve takes."""

import importlib

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from deployments.manifests import Override, overridden, read, render, targets
from serve.config import Settings
from tests.k8s.application import deployments_of
from tests.k8s.sources import ROOT, documents


CONFIG = yaml.safe_load((ROOT / "config.yaml").read_text("utf-8"))
TARGETS = {path.parent.name: (path, overrides) for path, overrides in targets()}
CONFIGS = {
    name: yaml.safe_load(documents(path)[0]["spec"]["serveConfigV2"])
    for name, (path, _) in TARGETS.items()
}
each = pytest.mark.parametrize("name", TARGETS)


def test_base_and_overlays_have_one():
    assert set(TARGETS) == {"base", "dev", "gpu"}


@each
def test_it_is_config_yaml_but_for_the_overrides(name):
    path, overrides = TARGETS[name]
    made = render(overridden(CONFIG, overrides))
    assert path.read_text("utf-8") == made, "run `make manifests`"


@each
def test_rays_schema_takes_it_and_knows_every_key(name):
    """Ray's own schema is lenient: a typo there would be ignored."""
    config = CONFIGS[name]
    ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    (application,) = config["applications"]
    assert set(application) <= set(ServeApplicationSchema.model_fields)
    for deployment in application["deployments"]:
        assert set(deployment) <= set(DeploymentSchema.model_fields)


@each
def test_import_paths_lead_to_builders_of_our_settings(name):
    (application,) = CONFIGS[name]["applications"]
    module, function = application["import_path"].split(":")
    builder = getattr(importlib.import_module(module), function)
    assert builder.__annotations__["args"] is Settings
    assert Settings.model_validate(application["args"]).models


@each
def test_the_application_has_every_deployment_that_is_named(name):
    names = {one.name for one in deployments_of(CONFIGS[name])}
    assert names == {"ingress", "worker-items", "embedder-default"}


@each
def test_deployments_scale_by_our_policies_where_they_scale(name):
    """Serve's own `autoscaling_config` would take the place of ours, and explain nothing."""
    (application,) = CONFIGS[name]["applications"]
    settings = Settings.model_validate(application["args"])
    for options in application["deployments"]:
        assert not {"autoscaling_config", "num_replicas"} & set(options)
    for one in deployments_of(CONFIGS[name]):
        rule = settings.deployments[one.name].autoscaling
        assert (rule is None) == (name == "dev")
        bounds = (1, 1) if rule is None else (rule.min, rule.max)
        assert (one.replicas_min, one.replicas_max) == bounds


@each
def test_a_pod_has_one_ingress_replica(name):
    (application,) = CONFIGS[name]["applications"]
    (options,) = (one for one in application["deployments"] if one["name"] == "ingress")
    assert options["max_replicas_per_node"] == 1


def test_a_deployment_that_is_only_in_the_file_is_found():
    at = "applications[headrace].deployments"
    wrong = overridden(CONFIGS["base"], [_override(at, [{"name": "embeder-default"}])])
    with pytest.raises(ValueError, match="no deployment"):
        deployments_of(wrong)


def _override(at, value, why="Some reason or other."):
    return Override(at=at, value=value, why=why)


def test_overrides_reach_into_lists_and_make_what_is_missing():
    config = {"a": [{"name": "x", "b": 1}, {"id": "y", "b": 2}], "c": 3}
    made = overridden(config, [_override("a[x].b", 9), _override("a[y].d.e", 5), _override("c", 0)])
    assert made == {"a": [{"name": "x", "b": 9}, {"id": "y", "b": 2, "d": {"e": 5}}], "c": 0}
    assert config["c"] == 3


def test_an_overlay_does_not_reach_into_what_others_have():
    base = [_override("a", {"b": 1})]
    assert overridden({}, [*base, _override("a.b", 2)]) == {"a": {"b": 2}}
    assert overridden({}, base) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ("a[z].b", 9, "there is no z"),
        ("a[x]", 9, "must end with a key"),
        ("a.[x]", 9, "not a place"),
        ("c", 3, "is 3 already"),
    ],
)
def test_an_override_without_a_place_or_an_effect_is_refused(at, value, message):
    with pytest.raises(ValueError, match=message):
        overridden({"a": [{"name": "x", "b": 1}], "c": 3}, [_override(at, value)])


def test_an_override_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "overrides.yaml"
    path.write_text("- {at: http_options.port, value: 1}\n", encoding="utf-8")
    with pytest.raises(ValidationError, match="why"):
        read(path)

"""The application that a `serveConfigV2` deploys, built without a cluster."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from ray.serve._private.build_app import build_app
from ray.serve._private.config import DeploymentConfig
from ray.serve.schema import ServeDeploySchema

from deployments import app
from serve.config import Settings
from tests.k8s.cluster_rules import Deployed


def deployments_of(config: Mapping[str, Any]) -> Sequence[Deployed]:
    """What the code binds, with the file's own options over it, as Serve's controller puts them together.

    Raises pydantic's ValidationError, ValueError for a deployment that is only in the file.
    """
    (application,) = ServeDeploySchema.model_validate(config).applications
    options = {
        one.name: one.model_dump(exclude_unset=True) | {"name": one.name}
        for one in application.deployments
    }
    with mock.patch.object(app, "start"), mock.patch.object(app, "open_vault"):
        bound = app.build(Settings.model_validate(application.args))
    built = build_app(bound, name=application.name).deployments
    if missing := set(options) - {one.name for one in built}:
        raise ValueError(f"the application has no deployment {sorted(missing)}")
    return [_deployed(one, options.get(one.name, {})) for one in built]


def _deployed(built: Any, options: Mapping[str, Any]) -> Deployed:
    own = {key: value for key, value in options.items() if key not in ("name", "ray_actor_options")}
    own.pop("max_replicas_per_node", None)
    config = DeploymentConfig(**(built._deployment_config.model_dump() | own))
    actor = options.get("ray_actor_options", built.ray_actor_options)
    scaled = config.autoscaling_config
    return Deployed(
        built.name,
        scaled.min_replicas if scaled else config.num_replicas,
        scaled.max_replicas if scaled else config.num_replicas,
        actor.get("num_cpus") or 0,
        actor.get("num_gpus") or 0,
        config.graceful_shutdown_timeout_s,
    )

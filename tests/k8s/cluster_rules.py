"""What we ask of the RayService: that its parts fit each other and the application that it runs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.config import Settings
from tests.k8s.house_rules import Object, kinds, ray_templates, serve_config, service_of


RAYS_FOLDER = "/tmp/ray"  # noqa: S108  of a container


@dataclass(frozen=True, slots=True)
class Deployed:
    """A Serve deployment as the file and the application's code together have it."""

    name: str
    replicas_min: int
    replicas_max: int
    cpus: float
    gpus: float
    drain_s: float


def settings_of(service: Object) -> Settings:
    """The `args` of its application."""
    (application,) = serve_config(service)["applications"]
    return Settings.model_validate(application["args"])


def _cluster(objects: Sequence[Object]) -> Object:
    return service_of(objects)["spec"]["rayClusterConfig"]


def _spec(template: Object) -> Object:
    return template["spec"]


def ray(objects: Sequence[Object], version: str) -> Iterator[str]:
    """The shape of the Ray cluster."""
    cluster = _cluster(objects)
    if cluster["rayVersion"] != version:
        yield f"rayVersion {cluster['rayVersion']} is not the image's {version}"
    if (
        not cluster.get("enableInTreeAutoscaling")
        or cluster["autoscalerOptions"]["version"] != "v2"
    ):
        yield "Ray's autoscaler v2 is off"
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "Ray's ports ask for no token"
    if cluster["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work"
    if not service_of(objects)["spec"].get("excludeHeadPodFromServeSvc"):
        yield "the head takes requests"
    for group in cluster["workerGroupSpecs"]:
        if not {"replicas", "minReplicas", "maxReplicas"} <= set(group):
            yield f"{group['groupName']} has no bounds"
        elif not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"{group['groupName']} begins outside of its bounds"


def pods(objects: Sequence[Object]) -> Iterator[str]:
    """What every Ray pod has."""
    found = ray_templates(service_of(objects))
    for name, template in found.items():
        (container,) = _spec(template)["containers"]
        if {"livenessProbe", "readinessProbe", "startupProbe"} & set(container):
            yield f"{name}: probes are KubeRay's"
        wanted, most = container["resources"]["requests"], container["resources"]["limits"]
        if wanted["memory"] != most["memory"]:
            yield f"{name}: memory that is asked for is not the limit"
        if container["envFrom"] != found["head"]["spec"]["containers"][0]["envFrom"]:
            yield f"{name}: another environment than the head's"
        logs = {
            mount["name"]
            for mount in container["volumeMounts"]
            if mount["mountPath"] == RAYS_FOLDER
        }
        sizes = {
            one["name"]: one.get("emptyDir", {}).get("sizeLimit")
            for one in _spec(template)["volumes"]
        }
        if not logs or not sizes[next(iter(logs))]:
            yield f"{name}: Ray's folder has no volume with a limit"
        if name == "head" and logs != {"ray-logs"}:
            yield "head: its autoscaler would have other logs"
        if "nvidia.com/gpu" in wanted and not _takes_cards(_spec(template)):
            yield f"{name}: asks for a card, and for no node that has one"


def _takes_cards(spec: Object) -> bool:
    tolerated = {one["key"] for one in spec.get("tolerations", ())}
    return "nvidia.com/gpu" in tolerated and "nodeSelector" in spec


def deadlines(objects: Sequence[Object], deployed: Sequence[Deployed]) -> Iterator[str]:
    """Time to leave: longer than everything that has to end in it."""
    service = service_of(objects)
    drain_s = settings_of(service).actors.drain_s
    slowest_s = max(one.drain_s for one in deployed)
    for name, template in ray_templates(service).items():
        spec = _spec(template)
        (container,) = spec["containers"]
        pause_s = (
            container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        )
        needed_s = drain_s if name == "head" else pause_s + slowest_s + drain_s
        if spec["terminationGracePeriodSeconds"] <= needed_s:
            yield f"{name}: {spec['terminationGracePeriodSeconds']} s are not more than {needed_s}"
    request_s = serve_config(service)["http_options"]["request_timeout_s"]
    if service["spec"]["rayClusterDeletionDelaySeconds"] <= request_s:
        yield "the old cluster goes before its last request may end"
    for route in kinds(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            if float(rule["timeouts"]["request"].removesuffix("s")) <= request_s:
                yield "the route gives up before Serve does"


def upgrades(objects: Sequence[Object]) -> Iterator[str]:
    """Two clusters side by side need what both can use; on SQLite there must be one."""
    service = service_of(objects)
    settings = settings_of(service)
    kind = service["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
    if kind != "None" and not settings.store.url_env:
        yield "SQLite has one owner: upgradeStrategy must be None"
    if kind != "None" and not settings.ledger.redis_url_env:
        yield "two clusters would each give out every limit: ledger.redis_url_env must be set"
    if settings.index.backend == "lancedb" and "://" not in settings.index.uri:
        yield "a folder as the index is read on its writer's node only"
    if any(pool.conduits == "node" for pool in settings.pools):
        yield "ingress replicas of other nodes would use handles: conduits must be network or off"


def listens(objects: Sequence[Object]) -> Iterator[str]:
    """Where Serve listens, and where pods say it does."""
    service = service_of(objects)
    http = serve_config(service)["http_options"]
    if http["host"] != "0.0.0.0":  # noqa: S104
        yield "Serve listens on loopback"
    for name, template in ray_templates(service).items():
        ports = {
            one["name"]: one["containerPort"] for one in _spec(template)["containers"][0]["ports"]
        }
        if ports.get("serve") != http["port"]:
            yield f"{name}: the port `serve` is not {http['port']}"


def capacity(objects: Sequence[Object], deployed: Sequence[Deployed]) -> Iterator[str]:
    """Whether the groups can hold the replicas: the most of each, and at the start the least."""
    groups = _cluster(objects)["workerGroupSpecs"]
    for bound, word in (("minReplicas", "replicas_min"), ("maxReplicas", "replicas_max")):
        if word == "replicas_min" and not all(group["minReplicas"] for group in groups):
            continue  # what is from zero comes when it is asked for
        for resource, asked in (("cpu", "cpus"), ("nvidia.com/gpu", "gpus")):
            held = sum(group[bound] * _amount(group, resource) for group in groups)
            wanted = sum(getattr(one, word) * getattr(one, asked) for one in deployed)
            if wanted > held:
                yield f"{word} want {wanted} of {resource}, {bound} hold {held}"
    for one in deployed:
        if one.cpus == 0 and one.gpus == 0:
            yield f"{one.name} asks for nothing: it may come to the head, and brings no pod"
        if not any(_fits(one, group) for group in groups):
            yield f"{one.name} fits into no pod"


def _amount(group: Object, resource: str) -> float:
    (container,) = group["template"]["spec"]["containers"]
    text = str(container["resources"]["requests"].get(resource, 0))
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def _fits(one: Deployed, group: Object) -> bool:
    return one.cpus <= _amount(group, "cpu") and one.gpus <= _amount(group, "nvidia.com/gpu")


def named_variables(settings: Settings) -> set[str]:
    """The environment variables that the settings name."""
    return {
        value
        for path, value in _leaves(settings.model_dump())
        if path.endswith("_env") and value and re.fullmatch(r"[A-Z][A-Z0-9_]*", value)
    } - {settings.index.pinecone.api_key_env}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{path}.{key}")
    else:
        yield path, value

"""What KubeRay 1.7 refuses of a RayService beyond its CRD's schema, with the feature gates as its chart
has them: alpha ones off, incremental upgrades on.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


Object = Mapping[str, Any]

NAME_CHARS_MAX = 47
"""Of a RayService: what KubeRay appends for its clusters must fit, too."""

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+|\d+")
TIMEOUT = "ray.io/initializing-timeout"
V2 = "RAY_enable_autoscaler_v2"
ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")
UPGRADES = ("NewCluster", "None", "NewClusterWithIncrementalUpgrade")


def faults(service: Object) -> list[str]:
    """What the operator would refuse, in its order; empty: nothing."""
    return [fault for rule in RULES for fault in rule(service)]


def _cluster(service: Object) -> Object:
    return service["spec"]["rayClusterConfig"]


def _groups(service: Object) -> Iterator[tuple[str, Object]]:
    """Head and worker groups, by name."""
    yield "head", _cluster(service)["headGroupSpec"]
    for group in _cluster(service).get("workerGroupSpecs", ()):
        yield group["groupName"], group


def _workers(service: Object) -> list[tuple[str, Object]]:
    return list(_groups(service))[1:]


def _env(group: Object) -> dict[str, str]:
    containers = group["template"]["spec"].get("containers") or [{}]
    return {one["name"]: one.get("value", "") for one in containers[0].get("env", ())}


def _head_env(service: Object) -> dict[str, str]:
    return _env(_cluster(service)["headGroupSpec"])


def _annotations(service: Object) -> Object:
    return service["metadata"].get("annotations") or {}


def _autoscaled(service: Object) -> bool:
    return bool(_cluster(service).get("enableInTreeAutoscaling"))


def _version(service: Object) -> tuple[int, ...] | None:
    text = _cluster(service).get("rayVersion", "")
    return (
        tuple(int(part) for part in text.split(".")) if re.fullmatch(r"\d+(\.\d+)+", text) else None
    )


def _on_v2(service: Object) -> bool:
    options = _cluster(service).get("autoscalerOptions") or {}
    asked = options.get("version")
    return _autoscaled(service) and (
        asked == "v2" if asked else _head_env(service).get(V2) in ("1", "true")
    )


def _metadata(service: Object) -> Iterator[str]:
    name = service["metadata"]["name"]
    if len(name) > NAME_CHARS_MAX:
        yield f"the name has more than {NAME_CHARS_MAX} characters"
    if not DNS_1035.fullmatch(name):
        yield f"the name {name!r} is no DNS-1035 label"
    waits = _annotations(service).get(TIMEOUT, "1")
    if not DURATION.fullmatch(waits) or not re.search("[1-9]", waits):
        yield f"{TIMEOUT} {waits!r} is no positive duration"


def _containers(service: Object) -> Iterator[str]:
    for name, group in _groups(service):
        if not group["template"]["spec"].get("containers"):
            yield f"{name} has no container"


def _resources(service: Object) -> Iterator[str]:
    for name, group in _groups(service):
        started = {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
        if started and group.get("resources"):
            yield f"{name} has resources both in rayStartParams and in resources"


def _labels(service: Object) -> Iterator[str]:
    for name, group in _groups(service):
        if "labels" in group["rayStartParams"]:
            yield f"{name}: rayStartParams.labels is not supported"
        for key, value in (group.get("labels") or {}).items():
            if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
                yield f"{name}: {key}={value} is no label"


def _replicas(service: Object) -> Iterator[str]:
    for name, group in _workers(service):
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not _autoscaled(service) and None in (least, most):
            yield f"{name} needs minReplicas and maxReplicas without autoscaling"
        if min(least or 0, most or 0) < 0:
            yield f"{name} has negative replicas"
        if None not in (least, most) and least > most:
            yield f"{name} has minReplicas above maxReplicas"
        if group.get("suspend") and _autoscaled(service):
            yield f"{name} cannot be suspended while it is autoscaled"


def _of_v2(service: Object) -> Iterator[str]:
    for name, group in _workers(service):
        idle = group.get("idleTimeoutSeconds")
        if idle is not None and (idle < 0 or not _on_v2(service)):
            yield f"{name}: idleTimeoutSeconds must not be negative, and needs autoscaler v2"
        if group.get("priority") and ((_version(service) or ()) < (2, 56) or not _on_v2(service)):
            yield f"{name}: priority needs rayVersion 2.56 and autoscaler v2"
    for name, group in _groups(service):
        policy = group["template"]["spec"].get("restartPolicy")
        if _on_v2(service) and policy not in (None, "", "Never"):
            yield f"{name}: autoscaler v2 wants restartPolicy Never or none"


def _autoscaler(service: Object) -> Iterator[str]:
    options, env = _cluster(service).get("autoscalerOptions") or {}, _head_env(service)
    if not _autoscaled(service) and env.get(V2) in ("1", "true"):
        yield f"{V2} is set without enableInTreeAutoscaling"
    if _autoscaled(service) and options.get("version") and V2 in env:
        yield f"autoscalerOptions.version and {V2} are both set"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(one["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for one in options.get("env", ())):
        yield "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD"


def _fault_tolerance(service: Object) -> Iterator[str]:
    options, env = _cluster(service).get("gcsFaultToleranceOptions"), _head_env(service)
    annotations = _annotations(service)
    started = _cluster(service)["headGroupSpec"]["rayStartParams"]
    if "redis-username" in started or "REDIS_USERNAME" in env:
        yield "the Redis user belongs into gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    if annotations.get("ray.io/ft-enabled"):
        yield "ray.io/ft-enabled and gcsFaultToleranceOptions are both set"
    if annotations.get("ray.io/external-storage-namespace"):
        yield "the storage namespace belongs into gcsFaultToleranceOptions"
    if "redis-password" in started or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(env):
        yield "Redis' address and password belong into gcsFaultToleranceOptions"
    if options.get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend rocksdb is alpha"
    elif options.get("storage") is not None:
        yield "gcsFaultToleranceOptions.storage is for the backend rocksdb"


def _authentication(service: Object) -> Iterator[str]:
    options = _cluster(service).get("authOptions") or {}
    if options.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not for RayServices"
    if options.get("mode") == "token" and (_version(service) or ()) < (2, 52):
        yield "authOptions.mode token needs rayVersion 2.52"


def _alpha(service: Object) -> Iterator[str]:
    for field in ALPHA:
        if _cluster(service).get(field) is not None:
            yield f"{field} is alpha"


def _service(service: Object) -> Iterator[str]:
    if (
        (_cluster(service)["headGroupSpec"].get("headService") or {})
        .get("metadata", {})
        .get("name")
    ):
        yield "headGroupSpec.headService must not be named"
    if (_cluster(service).get("upgradeStrategy") or {}).get("type"):
        yield "rayClusterConfig.upgradeStrategy is for clusters without a RayService"
    if service["spec"].get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"


def _upgrade(service: Object) -> Iterator[str]:
    strategy = service["spec"].get("upgradeStrategy") or {}
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type {kind!r} is none of {', '.join(UPGRADES)}"
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions") or {}
    step, surge = options.get("stepSizePercent", -1), options.get("maxSurgePercent", 100)
    if not _autoscaled(service):
        yield "incremental upgrades need enableInTreeAutoscaling"
    if not 0 <= step <= surge <= 100:
        yield "incremental upgrades need 0 <= stepSizePercent <= maxSurgePercent <= 100"
    if options.get("intervalSeconds", 0) <= 0 or not options.get("gatewayClassName"):
        yield "incremental upgrades need intervalSeconds and gatewayClassName"


RULES: Iterable[Callable[[Object], Iterator[str]]] = (
    _metadata,
    _authentication,
    _containers,
    _resources,
    _labels,
    _replicas,
    _of_v2,
    _autoscaler,
    _fault_tolerance,
    _alpha,
    _service,
    _upgrade,
)

"""What we ask of our own manifests, beyond what an API server and KubeRay's operator do."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml


Object = Mapping[str, Any]

PINNED = re.compile(r"[^\s:@]+(:\d+/[^\s:@]+)?(:(?=[\w.-]*\d)\w[\w.-]*|@sha256:[0-9a-f]{64})")
"""A digest, or a tag with a number in it: `latest`, `stable` and none at all move."""

SECRET = re.compile(r"(PASSWORD|TOKEN|SECRET|_KEY|_URL)$")
"""Names of variables whose values do not belong into a manifest."""

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
OPEN_TO = {8000: {"gateway", "kuberay"}, 8265: {"kuberay"}}
"""Ports that others than our own pods may reach, and from which namespaces; metrics below."""

METRICS = {8080, 44217, 44227}
TEMPLATED = ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet")


def kinds(objects: Sequence[Object], kind: str) -> list[Object]:
    """Those of one kind."""
    return [one for one in objects if one["kind"] == kind]


def service_of(objects: Sequence[Object]) -> Object:
    """The one RayService."""
    (service,) = kinds(objects, "RayService")
    return service


def serve_config(service: Object) -> dict[str, Any]:
    """Its `serveConfigV2`."""
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def ray_templates(service: Object) -> dict[str, Object]:
    """Pod templates of the head and of each worker group, by name."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def templates(objects: Sequence[Object]) -> dict[str, Object]:
    """Every pod template that is rendered, by what it belongs to."""
    found = {
        f"{one['kind']}/{one['metadata']['name']}": one["spec"]["template"]
        for one in objects
        if one["kind"] in TEMPLATED
    }
    for service in kinds(objects, "RayService"):
        found |= {f"RayService/{name}": one for name, one in ray_templates(service).items()}
    return found


def _containers(template: Object) -> list[Object]:
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def unpinned(objects: Sequence[Object]) -> Iterator[str]:
    """Images that may be another one tomorrow."""
    for place, template in templates(objects).items():
        for one in _containers(template):
            if not PINNED.fullmatch(one["image"]):
                yield f"{place}: {one['image']} is not pinned"


def insecure(objects: Sequence[Object]) -> Iterator[str]:
    """What the profile `restricted` of the pod security standards refuses."""
    for place, template in templates(objects).items():
        yield from (f"{place}: {fault}" for fault in _unrestricted(template["spec"]))
    for service in kinds(objects, "RayService"):
        options = service["spec"]["rayClusterConfig"].get("autoscalerOptions", {})
        autoscaler = {"name": "autoscaler", "securityContext": options.get("securityContext", {})}
        pod = ray_templates(service)["head"]["spec"].get("securityContext", {})
        yield from (f"autoscaler: {fault}" for fault in _unconfined(autoscaler, pod))


def _unrestricted(spec: Object) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    for volume in spec.get("volumes", ()):
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed"
    for container in _containers({"spec": spec}):
        yield from _unconfined(container, spec.get("securityContext", {}))


def _unconfined(container: Object, pod: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**pod, **own}
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield f"{container['name']} may gain privileges"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()):
        yield f"{container['name']} keeps capabilities"
    if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield f"{container['name']} adds capabilities"
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield f"{container['name']} may run as root"
    if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield f"{container['name']} has no seccomp profile"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield f"{container['name']} takes a port of the host"


def secrets_in_clear(objects: Sequence[Object]) -> Iterator[str]:
    """Values of variables that ought to come from a Secret."""
    for place, template in templates(objects).items():
        for container in _containers(template):
            for one in container.get("env", ()):
                if SECRET.search(one["name"]) and one.get("value"):
                    yield f"{place}: {one['name']} stands in the manifest"
    for one in kinds(objects, "ConfigMap"):
        for name in one.get("data", ()):
            if SECRET.search(name):
                yield f"ConfigMap {one['metadata']['name']}: {name} stands in the manifest"


def dangling(objects: Sequence[Object], outside: set[str]) -> Iterator[str]:
    """References of pods to what is neither rendered nor, for Secrets, made by the operator of the cluster."""
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}
    there |= {("Secret", name) for name in outside}
    there |= {("ServiceAccount", "default")}
    for place, reference in _references(objects):
        if reference not in there:
            yield f"{place}: there is no {reference[0]} {reference[1]}"


def _references(objects: Sequence[Object]) -> Iterator[tuple[str, tuple[str, str]]]:
    for place, template in templates(objects).items():
        spec = template["spec"]
        yield place, ("ServiceAccount", spec.get("serviceAccountName", "default"))
        for volume in spec.get("volumes", ()):
            if claim := volume.get("persistentVolumeClaim"):
                yield place, ("PersistentVolumeClaim", claim["claimName"])
        for container in _containers(template):
            for source in container.get("envFrom", ()):
                for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                    if key in source:
                        yield place, (kind, source[key]["name"])
    for service in kinds(objects, "RayService"):
        cluster = service["spec"]["rayClusterConfig"]
        yield "authOptions", ("Secret", cluster["authOptions"]["secretName"])
        if options := cluster.get("gcsFaultToleranceOptions"):
            source = options["redisPassword"]["valueFrom"]["secretKeyRef"]
            yield "gcsFaultToleranceOptions", ("Secret", source["name"])


def two_autoscalers(objects: Sequence[Object]) -> Iterator[str]:
    """Whatever scales pods beside Ray: the two would fight."""
    for one in objects:
        if one["kind"] in ("HorizontalPodAutoscaler", "ScaledObject", "VerticalPodAutoscaler"):
            yield f"{one['kind']} {one['metadata']['name']} beside Ray's autoscaler"


def open_ports(objects: Sequence[Object]) -> Iterator[str]:
    """Ports that a network policy opens to others than our own pods, but must not."""
    for policy in kinds(objects, "NetworkPolicy"):
        if "Ingress" not in policy["spec"]["policyTypes"]:
            yield "the policy does not say who may come in"
        for rule in policy["spec"].get("ingress", ()):
            yield from _opened(rule, policy["spec"]["podSelector"])


def _opened(rule: Object, ours: Object) -> Iterator[str]:
    for peer in rule.get("from") or [{}]:
        if peer == {"podSelector": ours}:
            continue
        labels = peer.get("namespaceSelector", {}).get("matchLabels", {})
        namespace = labels.get("kubernetes.io/metadata.name", "anywhere")
        for port in rule.get("ports") or [{}]:
            number = port.get("port", "every port")
            allowed = {"monitoring"} if number in METRICS else OPEN_TO.get(number, set())
            if namespace not in allowed or "endPort" in port:
                yield f"{number} is open to {namespace}"


def budgets(objects: Sequence[Object]) -> Iterator[str]:
    """Disruption budgets that Kubernetes cannot apply to pods of an operator, or that match none."""
    labels = service_of(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]
    worker = {**labels["metadata"]["labels"], "ray.io/node-type": "worker"}
    for budget in kinds(objects, "PodDisruptionBudget"):
        spec = budget["spec"]
        if not isinstance(spec.get("minAvailable"), int) or "maxUnavailable" in spec:
            yield "only a whole number of minAvailable counts for pods without a scale subresource"
        if not spec["selector"]["matchLabels"].items() <= worker.items():
            yield "the disruption budget matches no worker"


def routes(objects: Sequence[Object]) -> Iterator[str]:
    """Routes to another Service than the one KubeRay makes, or to another port than ours."""
    service = service_of(objects)
    ours = f"{service['metadata']['name']}-serve-svc", serve_config(service)["http_options"]["port"]
    for route in kinds(objects, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            if any((one["name"], one["port"]) != ours for one in rule["backendRefs"]):
                yield f"a route leads elsewhere than to {ours}"
            removed = [
                name
                for one in rule.get("filters", ())
                for name in one.get("requestHeaderModifier", {}).get("remove", ())
            ]
            if set(removed) != {"x-request-timeout-seconds", "x-request-disconnect-disabled"}:
                yield "a route lets clients set Serve's own time-out"


def monitors(objects: Sequence[Object]) -> Iterator[str]:
    """Ports that a PodMonitor scrapes and no pod has, and metrics ports that nobody scrapes."""
    named = {
        port["name"]: port["containerPort"]
        for template in ray_templates(service_of(objects)).values()
        for container in template["spec"]["containers"]
        for port in container["ports"]
    }
    for one in kinds(objects, "PodMonitor"):
        scraped = {named.get(end["port"]) for end in one["spec"]["podMetricsEndpoints"]}
        if scraped != METRICS:
            yield f"scraped are {scraped}, not {METRICS}"

"""Our own rules for manifests: what is in the repository keeps them, and each is seen when it is broken.

They are applied to everything that is rendered in `test_rendered_manifests.py`; here no kubectl is needed.
"""

import re
import tomllib

import pytest

from tests.k8s import cluster_rules, house_rules
from tests.k8s.application import deployments_of
from tests.k8s.cluster_rules import Deployed
from tests.k8s.house_rules import serve_config, service_of
from tests.k8s.sources import (
    GONE,
    K8S,
    ROOT,
    among,
    documents,
    everything,
    pinned,
    with_serve_config,
)


C = "spec/rayClusterConfig"
HEAD, WORKER = f"{C}/headGroupSpec/template/spec", f"{C}/workerGroupSpecs/0/template/spec"
BOX = f"{WORKER}/containers/0"
OUTSIDE = {"headrace-secrets", "headrace-ray-token"}
ARGS = "applications/0/args"
RAY = pinned("ray")
DEPLOYED = [Deployed("a", 2, 4, cpus=1, gpus=0, drain_s=60), Deployed("b", 1, 1, 2, 0, 20)]


@pytest.fixture(scope="module")
def objects():
    return everything()


def test_rayversion_is_that_of_the_image(objects):
    """The image is built with the constraints, and tagged with our version."""
    assert list(cluster_rules.ray(objects, RAY)) == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for template in house_rules.ray_templates(service_of(objects)).values():
        (container,) = template["spec"]["containers"]
        assert container["image"] == f"headrace:{project['version']}-cpu"


def test_the_image_has_what_kuberay_calls_and_the_settings_need():
    """wget is in KubeRay's readiness probe of workers; the slim image comes without."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert re.search(r"apt-get install .*\bwget\b", text)
    (extras,) = re.findall(r"headrace-\*\.whl\)\[([a-z0-9,]+)\]", text)
    assert {"pgvector", "postgres", "redis"} <= set(extras.split(","))


def test_ours_keep_them(objects):
    deployed = deployments_of(serve_config(service_of(objects)))
    assert list(cluster_rules.pods(objects)) == []
    assert list(cluster_rules.deadlines(objects, deployed)) == []
    assert list(cluster_rules.upgrades(objects)) == []
    assert list(cluster_rules.listens(objects)) == []
    assert list(cluster_rules.capacity(objects, deployed)) == []
    assert list(house_rules.dangling(objects, OUTSIDE)) == []
    for rule in HOUSE:
        assert list(rule(objects)) == []


HOUSE = (
    house_rules.unpinned,
    house_rules.insecure,
    house_rules.secrets_in_clear,
    house_rules.two_autoscalers,
    house_rules.open_ports,
    house_rules.budgets,
    house_rules.routes,
    house_rules.monitors,
)


def test_the_example_secrets_are_those_that_pods_and_settings_name(objects):
    secrets = {one["metadata"]["name"]: one for one in documents(K8S / "examples" / "secrets.yaml")}
    assert set(secrets) == OUTSIDE
    keys = set(secrets["headrace-secrets"]["stringData"])
    settings = cluster_rules.settings_of(service_of(objects))
    assert keys == cluster_rules.named_variables(settings) | {"REDIS_PASSWORD"}
    assert set(secrets["headrace-ray-token"]["stringData"]) == {"auth_token"}  # KubeRay's name
    synced = documents(K8S / "examples" / "external-secret.yaml")
    assert {one["spec"]["target"]["name"] for one in synced} == OUTSIDE


@pytest.mark.parametrize("image", ["h:0.1.0-cpu", "r.example.com:5000/h:1", f"h@sha256:{'0' * 64}"])
def test_pinned(image):
    assert house_rules.PINNED.fullmatch(image)


@pytest.mark.parametrize(
    "image", ["h", "h:latest", "h:stable", "h:", "r.example.com:5000/h", "h@sha256:0"]
)
def test_unpinned(objects, image):
    broken = among(objects, "RayService", {f"{BOX}/image": image})
    assert list(house_rules.unpinned(broken)) == [f"RayService/cpu: {image} is not pinned"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{WORKER}/hostNetwork": True}, "RayService/cpu: hostNetwork"),
        (
            {f"{WORKER}/volumes/+": {"name": "x", "hostPath": {"path": "/"}}},
            "RayService/cpu: volume x is of a kind that is not allowed",
        ),
        (
            {f"{BOX}/securityContext/privileged": True},
            "RayService/cpu: ray-worker may gain privileges",
        ),
        (
            {f"{BOX}/securityContext/allowPrivilegeEscalation": GONE},
            "RayService/cpu: ray-worker may gain privileges",
        ),
        (
            {f"{BOX}/securityContext/capabilities": GONE},
            "RayService/cpu: ray-worker keeps capabilities",
        ),
        (
            {f"{BOX}/securityContext/capabilities/add": ["SYS_ADMIN"]},
            "RayService/cpu: ray-worker adds capabilities",
        ),
        ({f"{WORKER}/securityContext/runAsUser": 0}, "RayService/cpu: ray-worker may run as root"),
        (
            {f"{BOX}/securityContext/runAsNonRoot": False},
            "RayService/cpu: ray-worker may run as root",
        ),
        (
            {f"{WORKER}/securityContext/seccompProfile": GONE},
            "RayService/cpu: ray-worker has no seccomp profile",
        ),
        ({f"{BOX}/ports/0/hostPort": 80}, "RayService/cpu: ray-worker takes a port of the host"),
        (
            {f"{C}/autoscalerOptions/securityContext/allowPrivilegeEscalation": True},
            "autoscaler: autoscaler may gain privileges",
        ),
    ],
)
def test_what_restricted_refuses(objects, changes, message):
    assert list(house_rules.insecure(among(objects, "RayService", changes))) == [message]


@pytest.mark.parametrize("name", ["REDIS_PASSWORD", "HEADRACE_STORE_URL", "RAY_AUTH_TOKEN"])
def test_a_secret_in_the_manifest(objects, name):
    env = [{"name": name, "value": "x"}]
    broken = among(objects, "RayService", {f"{BOX}/env": env})
    assert list(house_rules.secrets_in_clear(broken)) == [
        f"RayService/cpu: {name} stands in the manifest"
    ]
    referred = [{"name": name, "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    right = among(objects, "RayService", {f"{BOX}/env": referred})
    assert list(house_rules.secrets_in_clear(right)) == []
    broken = among(objects, "ConfigMap", {f"data/{name}": "x"})
    assert list(house_rules.secrets_in_clear(broken)) == [
        f"ConfigMap headrace-env: {name} stands in the manifest"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{BOX}/envFrom/0/configMapRef/name": "x"}, "RayService/cpu: there is no ConfigMap x"),
        ({f"{BOX}/envFrom/1/secretRef/name": "x"}, "RayService/cpu: there is no Secret x"),
        ({f"{WORKER}/serviceAccountName": "x"}, "RayService/cpu: there is no ServiceAccount x"),
        (
            {f"{WORKER}/volumes/1/persistentVolumeClaim/claimName": "x"},
            "RayService/cpu: there is no PersistentVolumeClaim x",
        ),
        ({f"{C}/authOptions/secretName": "x"}, "authOptions: there is no Secret x"),
        (
            {
                f"{C}/gcsFaultToleranceOptions": {
                    "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "x"}}}
                }
            },
            "gcsFaultToleranceOptions: there is no Secret x",
        ),
    ],
)
def test_a_reference_to_nothing(objects, changes, message):
    broken = among(objects, "RayService", changes)
    assert list(house_rules.dangling(broken, OUTSIDE)) == [message]


def test_an_autoscaler_of_pods_beside_rays(objects):
    hpa = {"kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}}
    assert list(house_rules.two_autoscalers([*objects, hpa])) == [
        "HorizontalPodAutoscaler x beside Ray's autoscaler"
    ]


def _from(namespace, *ports):
    labels = {"kubernetes.io/metadata.name": namespace}
    rule = {"from": [{"namespaceSelector": {"matchLabels": labels}}]}
    return rule | {"ports": [{"port": port} for port in ports]}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (_from("gateway", 8265), "8265 is open to gateway"),
        (_from("kuberay", 6379), "6379 is open to kuberay"),
        (_from("monitoring", 10001), "10001 is open to monitoring"),
        (_from("monitoring", 8000), "8000 is open to monitoring"),
        (_from("gateway"), "every port is open to gateway"),
        ({"ports": [{"port": 8000}]}, "8000 is open to anywhere"),
        ({"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, "every port is open to anywhere"),
    ],
)
def test_a_network_policy_that_opens_too_much(objects, rule, message):
    broken = among(objects, "NetworkPolicy", {"spec/ingress/+": rule})
    assert list(house_rules.open_ports(broken)) == [message]


def test_a_network_policy_that_says_nothing_of_who_comes_in(objects):
    broken = among(objects, "NetworkPolicy", {"spec/policyTypes": ["Egress"]})
    assert list(house_rules.open_ports(broken)) == ["the policy does not say who may come in"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spec/minAvailable": "50%"},
            "only a whole number of minAvailable counts for pods without a scale subresource",
        ),
        (
            {"spec/maxUnavailable": 1},
            "only a whole number of minAvailable counts for pods without a scale subresource",
        ),
        (
            {"spec/selector/matchLabels/ray.io~node-type": "x"},
            "the disruption budget matches no worker",
        ),
    ],
)
def test_a_disruption_budget_that_does_nothing(objects, changes, message):
    assert list(house_rules.budgets(among(objects, "PodDisruptionBudget", changes))) == [message]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spec/rules/0/backendRefs/0/name": "headrace"},
            "a route leads elsewhere than to ('headrace-serve-svc', 8000)",
        ),
        ({"spec/rules/0/filters": GONE}, "a route lets clients set Serve's own time-out"),
    ],
)
def test_a_route_that_leads_astray(objects, changes, message):
    assert list(house_rules.routes(among(objects, "HTTPRoute", changes))) == [message]


def test_a_metrics_port_that_nobody_scrapes(objects):
    broken = among(objects, "PodMonitor", {"spec/podMetricsEndpoints/2": GONE})
    (fault,) = house_rules.monitors(broken)
    assert fault.startswith("scraped are ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{C}/rayVersion": "2.59.0"}, f"rayVersion 2.59.0 is not the image's {RAY}"),
        ({f"{C}/enableInTreeAutoscaling": False}, "Ray's autoscaler v2 is off"),
        ({f"{C}/authOptions/mode": "disabled"}, "Ray's ports ask for no token"),
        ({f"{C}/headGroupSpec/rayStartParams": {}}, "the head takes work"),
        ({"spec/excludeHeadPodFromServeSvc": GONE}, "the head takes requests"),
        ({f"{C}/workerGroupSpecs/0/maxReplicas": GONE}, "cpu has no bounds"),
        ({f"{C}/workerGroupSpecs/0/replicas": 0}, "cpu begins outside of its bounds"),
    ],
)
def test_a_ray_cluster_of_another_shape(objects, changes, message):
    assert list(cluster_rules.ray(among(objects, "RayService", changes), RAY)) == [message]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{BOX}/readinessProbe": {}}, "cpu: probes are KubeRay's"),
        (
            {f"{BOX}/resources/requests/memory": "1Gi"},
            "cpu: memory that is asked for is not the limit",
        ),
        ({f"{BOX}/envFrom/1": GONE}, "cpu: another environment than the head's"),
        ({f"{WORKER}/volumes/0/emptyDir": {}}, "cpu: Ray's folder has no volume with a limit"),
        ({f"{BOX}/volumeMounts/0": GONE}, "cpu: Ray's folder has no volume with a limit"),
        (
            {f"{HEAD}/volumes/0/name": "x", f"{HEAD}/containers/0/volumeMounts/0/name": "x"},
            "head: its autoscaler would have other logs",
        ),
        (
            {f"{BOX}/resources/requests/nvidia.com~gpu": "1"},
            "cpu: asks for a card, and for no node that has one",
        ),
    ],
)
def test_a_pod_that_lacks_something(objects, changes, message):
    assert list(cluster_rules.pods(among(objects, "RayService", changes))) == [message]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "RayService",
            {f"{WORKER}/terminationGracePeriodSeconds": 105},
            "cpu: 105 s are not more than 105.0",
        ),
        (
            "RayService",
            {f"{HEAD}/terminationGracePeriodSeconds": 30},
            "head: 30 s are not more than 30.0",
        ),
        (
            "RayService",
            {"spec/rayClusterDeletionDelaySeconds": 300},
            "the old cluster goes before its last request may end",
        ),
        (
            "HTTPRoute",
            {"spec/rules/0/timeouts/request": "60s"},
            "the route gives up before Serve does",
        ),
    ],
)
def test_a_deadline_that_is_too_short(objects, kind, changes, message):
    broken = among(objects, kind, changes)
    assert list(cluster_rules.deadlines(broken, DEPLOYED)) == [message]


def _serving(objects, changes):
    return [
        with_serve_config(one, changes) if one["kind"] == "RayService" else one for one in objects
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{ARGS}/store": {}}, "SQLite has one owner: upgradeStrategy must be None"),
        (
            {f"{ARGS}/ledger": {}},
            "two clusters would each give out every limit: ledger.redis_url_env must be set",
        ),
        ({f"{ARGS}/index": {}}, "a folder as the index is read on its writer's node only"),
        (
            {f"{ARGS}/pools/0/conduits": "node"},
            "ingress replicas of other nodes would use handles: conduits must be network or off",
        ),
    ],
)
def test_two_clusters_at_a_time_that_cannot_share(objects, changes, message):
    assert list(cluster_rules.upgrades(_serving(objects, changes))) == [message]


def test_on_sqlite_one_cluster_at_a_time_is_right(objects):
    alone = among(objects, "RayService", {"spec/upgradeStrategy/type": "None"})
    assert list(cluster_rules.upgrades(_serving(alone, {f"{ARGS}/store": {}}))) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"http_options/host": "127.0.0.1"}, ["Serve listens on loopback"]),
        (
            {"http_options/port": 9000},
            ["head: the port `serve` is not 9000", "cpu: the port `serve` is not 9000"],
        ),
    ],
)
def test_serve_listens_elsewhere(objects, changes, message):
    assert list(cluster_rules.listens(_serving(objects, changes))) == message


@pytest.mark.parametrize(
    ("deployed", "message"),
    [
        (Deployed("c", 9, 9, 1, 0, 0), "replicas_min want 9 of cpu, minReplicas hold 8.0"),
        (Deployed("c", 1, 33, 1, 0, 0), "replicas_max want 33 of cpu, maxReplicas hold 32.0"),
        (
            Deployed("c", 1, 1, 0, 0, 0),
            "c asks for nothing: it may come to the head, and brings no pod",
        ),
        (Deployed("c", 1, 1, 5, 0, 0), "c fits into no pod"),
    ],
)
def test_replicas_that_have_no_room(objects, deployed, message):
    assert list(cluster_rules.capacity(objects, [deployed])) == [message]

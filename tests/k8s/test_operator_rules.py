"""KubeRay's semantic rules: our RayService breaks none, and each of them is seen when it is broken."""

import pytest

from tests.k8s.operator_rules import faults
from tests.k8s.sources import GONE, changed, ray_service


C = "spec/rayClusterConfig"
HEAD, WORKER = f"{C}/headGroupSpec", f"{C}/workerGroupSpecs/0"
HEAD_ENV = f"{HEAD}/template/spec/containers/0/env"
FT = {f"{C}/gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}
UNSCALED = {f"{C}/enableInTreeAutoscaling": False}
OPTIONS = {"gatewayClassName": "g", "stepSizePercent": 10, "intervalSeconds": 60}
BY_STEPS = "NewClusterWithIncrementalUpgrade"


def _stepwise(**options):
    return {"spec/upgradeStrategy": {"type": BY_STEPS, "clusterUpgradeOptions": OPTIONS | options}}


def _env(name, value="1"):
    return [{"name": name, "value": value}]


@pytest.fixture(scope="module")
def service():
    return ray_service()


def test_ours_breaks_none(service):
    assert faults(service) == []


@pytest.mark.parametrize(
    "changes",
    [
        FT,
        _stepwise(),
        UNSCALED,
        {f"{C}/autoscalerOptions/version": GONE, HEAD_ENV: _env("RAY_enable_autoscaler_v2")},
        {"metadata/annotations": {"ray.io/initializing-timeout": "30m"}},
        {f"{WORKER}/idleTimeoutSeconds": 60, f"{WORKER}/priority": 10},
        {f"{WORKER}/labels": {"ray.io/market-type": "spot"}},
        {
            "metadata/annotations": {"ray.io/ft-enabled": "true"},
            HEAD_ENV: _env("RAY_REDIS_ADDRESS"),
        },
        {f"{WORKER}/template/spec/restartPolicy": "Never"},
    ],
)
def test_what_the_operator_takes_is_no_fault(service, changes):
    assert faults(changed(service, changes)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata/name": "h" * 48}, "the name has more than 47 characters"),
        ({"metadata/name": "2headrace"}, "the name '2headrace' is no DNS-1035 label"),
        (
            {"metadata/annotations": {"ray.io/initializing-timeout": "soon"}},
            "ray.io/initializing-timeout 'soon' is no positive duration",
        ),
        (
            {"metadata/annotations": {"ray.io/initializing-timeout": "0s"}},
            "ray.io/initializing-timeout '0s' is no positive duration",
        ),
        ({f"{WORKER}/template/spec/containers": []}, "cpu has no container"),
        (
            {f"{HEAD}/resources": {"CPU": "0"}},
            "head has resources both in rayStartParams and in resources",
        ),
        (
            {f"{WORKER}/resources": {"CPU": "4"}, f"{WORKER}/rayStartParams": {"num-gpus": "1"}},
            "cpu has resources both in rayStartParams and in resources",
        ),
        (
            {f"{WORKER}/rayStartParams": {"labels": "a=b"}},
            "cpu: rayStartParams.labels is not supported",
        ),
        ({f"{WORKER}/labels": {"a b": "c"}}, "cpu: a b=c is no label"),
        ({f"{HEAD}/labels": {"a": "-"}}, "head: a=- is no label"),
        (
            {**UNSCALED, f"{WORKER}/maxReplicas": GONE},
            "cpu needs minReplicas and maxReplicas without autoscaling",
        ),
        ({f"{WORKER}/minReplicas": -1}, "cpu has negative replicas"),
        ({f"{WORKER}/minReplicas": 9}, "cpu has minReplicas above maxReplicas"),
        ({f"{WORKER}/suspend": True}, "cpu cannot be suspended while it is autoscaled"),
        (
            {f"{WORKER}/idleTimeoutSeconds": -1},
            "cpu: idleTimeoutSeconds must not be negative, and needs autoscaler v2",
        ),
        (
            {f"{WORKER}/idleTimeoutSeconds": 60, f"{C}/autoscalerOptions/version": "v1"},
            "cpu: idleTimeoutSeconds must not be negative, and needs autoscaler v2",
        ),
        (
            {f"{WORKER}/priority": 1, f"{C}/rayVersion": "2.55.1"},
            "cpu: priority needs rayVersion 2.56 and autoscaler v2",
        ),
        (
            {f"{WORKER}/template/spec/restartPolicy": "Always"},
            "cpu: autoscaler v2 wants restartPolicy Never or none",
        ),
        (
            {f"{HEAD}/template/spec/restartPolicy": "OnFailure"},
            "head: autoscaler v2 wants restartPolicy Never or none",
        ),
        (
            {**UNSCALED, HEAD_ENV: _env("RAY_enable_autoscaler_v2", "true")},
            "RAY_enable_autoscaler_v2 is set without enableInTreeAutoscaling",
        ),
        (
            {HEAD_ENV: _env("RAY_enable_autoscaler_v2")},
            "autoscalerOptions.version and RAY_enable_autoscaler_v2 are both set",
        ),
        (
            {f"{C}/autoscalerOptions/idleTimeoutSeconds": -1},
            "autoscalerOptions.idleTimeoutSeconds is negative",
        ),
        (
            {f"{C}/autoscalerOptions/env": _env("KUBERAY_GEN_AUTOSCALER_START_CMD")},
            "autoscalerOptions.env sets KUBERAY_GEN_AUTOSCALER_START_CMD",
        ),
        (
            {HEAD_ENV: _env("REDIS_USERNAME")},
            "the Redis user belongs into gcsFaultToleranceOptions",
        ),
        (
            {HEAD_ENV: _env("RAY_REDIS_ADDRESS")},
            "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions",
        ),
        (
            {**FT, "metadata/annotations": {"ray.io/ft-enabled": "true"}},
            "ray.io/ft-enabled and gcsFaultToleranceOptions are both set",
        ),
        (
            {**FT, "metadata/annotations": {"ray.io/external-storage-namespace": "x"}},
            "the storage namespace belongs into gcsFaultToleranceOptions",
        ),
        (
            {**FT, HEAD_ENV: _env("REDIS_PASSWORD")},
            "Redis' address and password belong into gcsFaultToleranceOptions",
        ),
        (
            {**FT, HEAD_ENV: _env("RAY_REDIS_ADDRESS")},
            "Redis' address and password belong into gcsFaultToleranceOptions",
        ),
        (
            {**FT, f"{HEAD}/rayStartParams/redis-password": "x"},
            "Redis' address and password belong into gcsFaultToleranceOptions",
        ),
        (
            {f"{C}/gcsFaultToleranceOptions": {"backend": "rocksdb"}},
            "gcsFaultToleranceOptions.backend rocksdb is alpha",
        ),
        (
            {f"{C}/gcsFaultToleranceOptions": {"storage": {"size": "1Gi"}}},
            "gcsFaultToleranceOptions.storage is for the backend rocksdb",
        ),
        (
            {f"{C}/authOptions/enableK8sTokenAuth": True},
            "authOptions.enableK8sTokenAuth is not for RayServices",
        ),
        ({f"{C}/rayVersion": GONE}, "authOptions.mode token needs rayVersion 2.52"),
        ({f"{C}/rayVersion": "2.51.2"}, "authOptions.mode token needs rayVersion 2.52"),
        ({f"{C}/networkPolicy": {}}, "networkPolicy is alpha"),
        ({f"{C}/tlsOptions": {}}, "tlsOptions is alpha"),
        ({f"{C}/historyServerOptions": {}}, "historyServerOptions is alpha"),
        (
            {f"{HEAD}/headService": {"metadata": {"name": "x"}}},
            "headGroupSpec.headService must not be named",
        ),
        (
            {f"{C}/upgradeStrategy": {"type": "Recreate"}},
            "rayClusterConfig.upgradeStrategy is for clusters without a RayService",
        ),
        (
            {"spec/rayClusterDeletionDelaySeconds": -1},
            "rayClusterDeletionDelaySeconds is negative",
        ),
        (
            {"spec/upgradeStrategy/type": "Recreate"},
            f"upgradeStrategy.type 'Recreate' is none of NewCluster, None, {BY_STEPS}",
        ),
        (
            {**_stepwise(), **UNSCALED},
            "incremental upgrades need enableInTreeAutoscaling",
        ),
        (
            _stepwise(maxSurgePercent=5),
            "incremental upgrades need 0 <= stepSizePercent <= maxSurgePercent <= 100",
        ),
        (
            _stepwise(stepSizePercent=101, maxSurgePercent=101),
            "incremental upgrades need 0 <= stepSizePercent <= maxSurgePercent <= 100",
        ),
        (
            _stepwise(intervalSeconds=0),
            "incremental upgrades need intervalSeconds and gatewayClassName",
        ),
        (
            _stepwise(gatewayClassName=""),
            "incremental upgrades need intervalSeconds and gatewayClassName",
        ),
    ],
)
def test_what_the_operator_refuses_is_found(service, changes, message):
    assert faults(changed(service, changes)) == [message]

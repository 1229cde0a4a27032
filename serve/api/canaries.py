"""`GET /v1/admin/canaries`: where every canary stands and how its two models compare, for operators."""

from typing import Any, Literal, get_args

from fastapi import APIRouter, Response

from serve.api.service import Ordered
from serve.api.shapes import Shape
from serve.api.wire import reply
from serve.canary import ArmFigures, ShadowEnd
from serve.flows.comparisons import Compared, Standing
from serve.sketch import Sketch


router = APIRouter()


class Quantiles(Shape):
    """Milliseconds over so many requests; null where there are none."""

    requests: int
    p50: float | None
    p95: float | None


class ArmShown(Shape):
    """What one of a canary's models answered; `latency_ms` with its wait, `model_ms` without."""

    requests: int
    latency_ms: Quantiles
    model_ms: Quantiles


class ArmsShown(Shape):
    """Both models."""

    stable: ArmShown
    candidate: ArmShown


class ShadowsShown(Shape):
    """What became of the requests that were to be repeated."""

    compared: int
    failed: int
    dropped: int
    skipped: int


class CosineShown(Shape):
    """Of the two vectors of the same input; nulls where none were compared."""

    inputs: int
    min: float | None
    mean: float | None
    p01: float | None


class CanaryShown(Shape):
    """A canary and its figures over all ingress replicas, each since it began with these settings."""

    object: Literal["canary"]
    model: str
    to: str
    share: float
    shadow: float
    same_vectors: bool
    state: Standing
    reason: str
    replicas: int
    arms: ArmsShown
    fallbacks: int
    shadows: ShadowsShown
    cosine: CosineShown


class CanaryList(Shape):
    """Every canary of the settings."""

    object: Literal["list"]
    data: list[CanaryShown]


@router.get("/v1/admin/canaries", responses={200: {"model": CanaryList}})
async def canaries(order: Ordered) -> Response:
    """Where every canary stands, and how its two models compare."""
    compared = await order.canaries.compared()
    return reply({"object": "list", "data": [_shown(one) for one in compared]})


def _shown(one: Compared) -> dict[str, Any]:
    figures, distances = one.figures, one.figures.distances
    return {
        "object": "canary",
        **one.canary.model_dump(include={"model", "to", "share", "shadow", "same_vectors"}),
        "state": one.state,
        "reason": one.reason,
        "replicas": one.replicas,
        "arms": {name: _arm(arm) for name, arm in figures.arms.items()},
        "fallbacks": figures.fallbacks,
        "shadows": {end: figures.shadows[end] for end in get_args(ShadowEnd)},
        "cosine": {
            "inputs": distances.count,
            "min": _cosine(distances.quantile(1)),
            "mean": _cosine(distances.mean),
            "p01": _cosine(distances.quantile(0.99)),
        },
    }


def _arm(arm: ArmFigures) -> dict[str, Any]:
    return {
        "requests": arm.requests,
        "latency_ms": _milliseconds(arm.took),
        "model_ms": _milliseconds(arm.infer),
    }


def _milliseconds(took: Sketch) -> dict[str, Any]:
    p50, p95 = (None if one is None else one * 1e3 for one in map(took.quantile, (0.5, 0.95)))
    return {"requests": took.count, "p50": p50, "p95": p95}


def _cosine(distance: float | None) -> float | None:
    return None if distance is None else 1 - distance

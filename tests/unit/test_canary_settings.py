"""Settings of canaries: what may be tried in the place of what."""

import pytest
from pydantic import ValidationError

from serve.config import Canary, Model, Pool, Settings


def model(name, **fields):
    return Model(id=name, **{"engine": "fake", "tokens_max": 64, "dimensions": 8, **fields})


ONNX = {"engine": "onnx", "source": "folder", "sha256": "0" * 64}
MODELS = (
    model("exact", **ONNX),
    model("coarse", precision="int8", **ONNX),
    model("old"),
    model("new"),
    model("long", dimensions=16),
    model("cut", matryoshka=True),
    model("judge", kind="reranker", dimensions=1),
)


def settings(*canaries) -> Settings:
    return Settings(pools=(Pool(models=MODELS),), canaries=canaries)


def canary(**fields):
    return {"model": "old", "to": "new", **fields}


def test_a_shadow_may_be_of_any_model_and_a_share_of_the_same_vectors():
    made = settings(
        canary(share=0.25, shadow=0.75, same_vectors=True, tiers=["free"]),
        canary(model="new", to="long", shadow=1),
        canary(model="cut", to="long", enabled=False),
    )
    assert [one.to for one in made.canaries] == ["new", "long", "long"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ([canary(to="old")], "`to` must be another model"),
        ([canary(to="gone")], "'gone' is no model of kind `embedding`"),
        ([canary(model="gone")], "'gone' is no model of kind `embedding`"),
        ([canary(to="judge")], "'judge' is no model of kind `embedding`"),
        ([canary(share=0.1)], "share needs same_vectors"),
        ([canary(share=0.6, shadow=0.5, same_vectors=True)], "at most 1 together"),
        ([canary(to="long", same_vectors=True)], "equal `dimensions`"),
        ([canary(model="cut", same_vectors=True)], "`matryoshka`"),
        ([canary(model="exact", to="coarse", same_vectors=True)], "int8 of both or of neither"),
        ([canary(tiers=["gold"])], r"there are no tiers \['gold'\]"),
        ([canary(except_tiers=["gold"])], r"there are no tiers \['gold'\]"),
        ([canary(), canary(to="long")], "a model has one canary"),
    ],
)
def test_what_cannot_be_is_refused_by_name(wrong, says):
    with pytest.raises(ValidationError, match=says):
        settings(*wrong)


def test_a_key_names_exactly_these_settings():
    one = Canary(**canary(shadow=0.5))
    assert one.key == Canary(**canary(shadow=0.5)).key
    assert one.key != Canary(**canary(shadow=0.6)).key

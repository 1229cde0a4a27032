"""Settings: strict, bounded, described."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from serve.allowance import Allowance, Quota
from serve.config import Settings


FAKE = {"id": "fake", "engine": "fake", "dimensions": 8, "tokens_max": 64}


def _models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _models(part, seen)


SECTIONS = list(_models(Settings, set()))
FIELDS = [(model, name) for model in SECTIONS for name in model.model_fields]


def _where(raw: dict[str, Any]) -> str:
    """The path of what pydantic finds wrong first."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(raw)
    return ".".join(str(part) for part in caught.value.errors()[0]["loc"])


def test_defaults_are_complete():
    settings = Settings()
    assert set(settings.admission.tiers) == {"free", "premium", "enterprise"}
    assert "all-MiniLM-L6-v2" in settings.models


def test_default_weights_are_sixteen_to_four_to_one():
    tiers = Settings().admission.tiers
    assert [tiers[name].weight for name in ("enterprise", "premium", "free")] == [16, 4, 1]


@pytest.mark.parametrize("model", SECTIONS, ids=lambda model: model.__name__)
def test_every_section_refuses_unknown_keys_and_changes(model):
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]


@pytest.mark.parametrize(
    ("model", "name"), FIELDS, ids=[f"{model.__name__}.{name}" for model, name in FIELDS]
)
def test_every_field_is_described_and_bounded(model, name):
    assert model.model_fields[name].description.endswith(".")
    schema = model.model_json_schema()["properties"][name]
    for option in schema.get("anyOf", ()):  # an optional value is bounded as well
        if option != {"type": "null"}:
            schema = option
    kind = schema.get("type")
    if kind in ("integer", "number"):
        assert {"minimum", "exclusiveMinimum"} & set(schema), "no lower bound"
    if kind in ("integer", "number") and name != "created":
        assert {"maximum", "exclusiveMaximum"} & set(schema), "no upper bound"
    if kind == "array":
        assert "maxItems" in schema


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ({"limts": {}}, "limts"),
        ({"limits": {"inputs": 1}}, "limits.inputs"),
        ({"limits": {"inputs_max": 0}}, "limits.inputs_max"),
        ({"limits": {"inputs_max": "many"}}, "limits.inputs_max"),
        ({"limits": {"interactive_deadline_s": float("nan")}}, "limits.interactive_deadline_s"),
        ({"admission": {"tiers": {}}}, "admission.tiers"),
        ({"admission": {"tiers": {"Free Tier": {}}}}, "admission.tiers.Free Tier.[key]"),
        ({"pools": []}, "pools"),
        ({"pools": [{"models": [FAKE | {"dimension": 8}]}]}, "pools.0.models.0.dimension"),
        ({"pools": [{"models": [FAKE | {"engine": "magic"}]}]}, "pools.0.models.0.engine"),
        ({"pools": [{"models": [FAKE | {"sha256": "abc"}]}]}, "pools.0.models.0.sha256"),
        ({"limits": {"unknown_fields": "guess"}}, "limits.unknown_fields"),
        ({"store": {"path": ""}}, "store.path"),
        ({"ledger": {"redis_url_env": "redis://:secret@host"}}, "ledger.redis_url_env"),
        ({"ledger": {"lease_s": 1}}, "ledger.lease_s"),
    ],
)
def test_what_is_wrong_is_named(raw, where):
    assert _where(raw) == where


def test_a_weight_of_zero_is_refused():
    """It divides cost, so it would mean never."""
    tier = Settings().admission.tiers["free"].model_dump() | {"weight": 0}
    assert _where({"admission": {"tiers": {"free": tier}}}) == "admission.tiers.free.weight"


def test_a_burst_that_is_not_given_is_a_minutes_worth():
    quota = Quota(requests_per_minute=0.5, tokens_per_minute=90)
    assert (quota.requests_burst, quota.tokens_burst) == (1, 90)
    assert Quota(requests_per_minute=30, requests_burst=2).requests_burst == 2
    assert Quota().requests_burst is None


def test_a_burst_must_refill():
    with pytest.raises(ValidationError, match="tokens_burst needs tokens_per_minute"):
        Quota(tokens_burst=100)


def test_the_bucket_of_100_that_refills_10_a_minute():
    quota = Quota(preset="bucket_100_10")
    assert (quota.requests_burst, quota.requests_per_minute) == (100, 10)
    assert Quota(preset="bucket_100_10", requests_per_minute=20).requests_per_minute == 20


def test_changes_of_an_allowance():
    tier = Settings().admission.tiers["free"]
    changed = tier.changed({"interactive": {"requests_per_minute": 60}, "tokens_per_month": 9})
    assert changed.interactive.requests_per_minute == 60
    assert changed.interactive.requests_burst == 60  # it went with its rate
    assert changed.interactive.tokens_burst == tier.interactive.tokens_burst
    assert (changed.bulk, changed.tokens_per_month) == (tier.bulk, 9)
    gone = tier.changed({"interactive": {"tokens_per_minute": None}})
    assert gone.interactive.tokens_per_minute is gone.interactive.tokens_burst is None
    assert type(tier.changed({})) is Allowance
    with pytest.raises(ValidationError, match="weight"):
        tier.changed({"weight": 2})


REAL = FAKE | {"source": "x", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("engine", "precision", "gpus", "message"),
    [
        ("onnx", "int8", 0, None),
        ("onnx", "float32", 0, None),
        ("onnx", "bfloat16", 0, None),
        ("onnx", "float16", 0, "engine onnx computes in auto, bfloat16, float32, int8"),
        ("sentence_transformers", "float32", 0, None),
        ("sentence_transformers", "bfloat16", 1, None),
        ("sentence_transformers", "float16", 0.5, None),
        ("sentence_transformers", "float16", 0, "pool default: torch needs a GPU for float16"),
        ("sentence_transformers", "int8", 1, "sentence_transformers computes in auto, bfloat16"),
        ("fake", "float32", 0, "engine fake computes in auto"),
    ],
)
def test_an_engine_is_given_only_what_it_can_compute_with(engine, precision, gpus, message):
    model = REAL | {"engine": engine, "precision": precision}
    raw = {"pools": [{"models": [model], "gpus": gpus}]}
    if message is None:
        assert Settings.model_validate(raw).pools[0].models[0].precision == precision
    else:
        with pytest.raises(ValidationError, match=message):
            Settings.model_validate(raw)


def test_a_real_engine_needs_its_files_and_their_hash():
    model = FAKE | {"engine": "sentence_transformers"}
    with pytest.raises(ValidationError, match="source and sha256 are required"):
        Settings.model_validate({"pools": [{"models": [model]}]})


def test_graphs_run_on_cpus():
    graph = FAKE | {"engine": "onnx", "source": "x", "sha256": "0" * 64}
    assert Settings.model_validate({"pools": [{"models": [graph]}]})
    with pytest.raises(ValidationError, match="engine onnx runs on CPUs"):
        Settings.model_validate({"pools": [{"models": [graph], "gpus": 0.5}]})


def test_folders_of_graphs_go_with_the_data_folder_unless_they_are_absolute(tmp_path):
    pools = [
        {"models": [FAKE]},
        {"name": "b", "models": [FAKE | {"id": "b"}], "graphs": "/opt/graphs"},
    ]
    placed = Settings.model_validate({"pools": pools}).under(tmp_path / "data")
    assert placed.data_dir == str(tmp_path / "data")
    assert [pool.graphs for pool in placed.pools] == [str(tmp_path / "data/graphs"), "/opt/graphs"]
    assert {pool.profiles for pool in placed.pools} == {str(tmp_path / "data/profiles")}


def test_a_pinned_model_is_not_unloaded():
    model = FAKE | {"unload_after_s": 60}
    assert Settings.model_validate({"pools": [{"models": [model | {"pinned": False}]}]})
    with pytest.raises(ValidationError, match="models that are not pinned"):
        Settings.model_validate({"pools": [{"models": [model]}]})


@pytest.mark.parametrize(
    ("pools", "word"),
    [
        ([{"models": [FAKE, FAKE]}], "model"),
        ([{"models": [FAKE]}, {"models": [FAKE | {"id": "other"}]}], "pool"),
    ],
)
def test_names_are_unique(pools, word):
    with pytest.raises(ValidationError, match=f"{word} names must be unique"):
        Settings.model_validate({"pools": pools})


def test_overlap_is_at_most_half_of_the_chunk():
    assert Settings.model_validate({"chunking": {"tokens": 64, "overlap": 32}})
    assert _where({"chunking": {"tokens": 64, "overlap": 33}}) == "chunking"


def test_settings_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().data_dir = "elsewhere"


def test_settings_survive_json():
    assert Settings.model_validate_json(Settings().model_dump_json()) == Settings()


def test_deliveries_that_are_sent_at_once_have_a_connection_each():
    with pytest.raises(ValidationError, match=r"webhooks\.sends_max"):
        Settings.model_validate({"webhooks": {"sends_max": 3}, "egress": {"connections_max": 2}})

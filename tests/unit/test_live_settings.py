"""What of the settings may change while replicas go on, and that a wrong change changes nothing."""

import logging

import pytest

from deployments.live import Following
from serve import logs
from serve.config import Model, Pool, Settings
from serve.config.live import Live, fault, laid_over


FAKE = Model(id="m", engine="fake", dimensions=8, tokens_max=64)
OTHER = FAKE.model_copy(update={"id": "n"})
SETTINGS = Settings(pools=(Pool(models=(FAKE,)), Pool(name="second", models=(OTHER,))))


def test_a_tier_is_replaced_and_the_others_stay():
    changed = laid_over(SETTINGS, {"admission": {"tiers": {"free": {"weight": 2}}}})
    assert changed.admission.tiers["free"].weight == 2
    assert changed.admission.tiers["free"].interactive.requests_per_minute is None
    assert changed.admission.tiers["premium"] == SETTINGS.admission.tiers["premium"]
    assert SETTINGS.admission.tiers["free"].weight == 1


def test_a_preset_and_a_new_tier_are_known():
    tier = {"weight": 3, "interactive": {"preset": "bucket_100_10"}}
    changed = laid_over(SETTINGS, {"admission": {"tiers": {"trial": tier}}})
    assert changed.admission.tiers["trial"].interactive.requests_burst == 100
    assert changed.admission.tiers.keys() == {*SETTINGS.admission.tiers, "trial"}


def test_pools_go_by_name():
    changed = laid_over(SETTINGS, {"pools": [{"name": "second", "batch": {"target_ms": 5}}]})
    assert [pool.batch.target_ms for pool in changed.pools] == [50, 5]
    assert changed.pools[1].models == SETTINGS.pools[1].models


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"admission": {"tiers": {"free": {"weight": 0}}}}, "admission.tiers.free.weight: Input"),
        ({"admission": {"tiers": {"free": {}}}}, "admission.tiers.free.weight: Field required"),
        ({"admission": {"tiers": 7}}, "admission.tiers: must be a table"),
        ({"admission": {"key_cache_s": 1}}, "admission.key_cache_s: not a live setting"),
        ({"admision": {}}, "admision: there is no such setting"),
        ({"data_dir": "x"}, "data_dir: not a live setting"),
        ({"pools": [{"name": "third", "batch": {}}]}, "pools: ['third'] are not among the names"),
        ({"pools": [{"batch": {}}]}, "pools: ['None'] are not among the names"),
        ({"pools": {"default": {}}}, "pools: must be a list"),
        ({"pools": [{"name": "default", "batch": {"target_ms": -1}}]}, "target_ms: Input"),
        ({"pools": [{"name": "default", "cpus": 2}]}, "pools[default].cpus: not a live setting"),
        ([], "the settings: must be a table"),
    ],
)
def test_what_is_wrong_is_named_and_changes_nothing(changes, said):
    live = Live(SETTINGS)
    live.change({"logs": {"level": "ERROR"}})
    before = live.now
    with pytest.raises(ValueError, match=r".") as caught:
        live.change(changes)
    assert said in fault(caught.value)
    assert live.now is before


def test_what_is_not_said_any_more_is_as_at_the_start():
    live = Live(SETTINGS)
    live.change({"logs": {"level": "DEBUG"}})
    live.change({"admission": {"tiers": {"free": {"weight": 9}}}})
    assert live.now.logs.level == "WARNING"
    live.change({})
    assert live.now == SETTINGS


def test_a_replica_goes_on_with_what_held_before_and_says_so(caplog):
    following = Following(Live(SETTINGS))
    assert following.follow({"admission": {"tiers": {"free": {"weight": 4}}}})
    assert not following.follow({"admission": {"tiers": {"free": {"weight": "heavy"}}}})
    assert following.live.now.admission.tiers["free"].weight == 4
    assert "admission.tiers.free.weight" in caplog.text
    (reading,) = following.readings()
    assert (reading.name, reading.value) == ("headrace_settings_refused", 1)
    assert following.follow(None)
    assert [one.value for one in following.readings()] == [0]
    assert following.live.now == SETTINGS


def test_the_level_of_the_log_changes_where_lines_are_json():
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    before = [(one.handlers, one.level, one.propagate) for one in loggers]
    try:
        Following(Live(SETTINGS)).follow({"logs": {"level": "DEBUG"}})
        assert all(one.level != logging.DEBUG for one in loggers)
        logs.begin("test", "ERROR")
        Following(Live(SETTINGS)).follow({"logs": {"level": "DEBUG"}})
        assert all(one.level == logging.DEBUG for one in loggers)
    finally:
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)

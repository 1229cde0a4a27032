"""serve.flows.trial_reports and serve.flows.comparisons: what the replicas said, put together."""

import pytest

from serve.canary import CanaryReport, CanaryReports, Figures
from serve.config import Canary
from serve.flows import trial_reports
from serve.flows.comparisons import compared
from serve.flows.trial_reports import LAPSE_S, TrialReports


CANARY = Canary(model="old", to="new", share=0.25, shadow=0.5, same_vectors=True)


def report(state="running", reason="", key=CANARY.key, took=()) -> CanaryReport:
    figures = Figures()
    for value in took:
        figures.arms["candidate"].requests += 1
        figures.arms["candidate"].took.add(value)
        figures.distances.add(value / 1000)
        figures.fallbacks += 2
        figures.shadows["compared"] += 1
    return CanaryReport(key, state, reason, figures)


@pytest.fixture
def book(clock) -> TrialReports:
    return TrialReports(clock)


def test_figures_of_replicas_add_up(book):
    book.keep("a", [report(took=[1.0]), report(key="another", took=[9.0])])
    book.keep("b", [report(took=[2.0, 3.0])])
    book.keep("a", [report(took=[1.0, 4.0])])  # in the place of what it said before
    found = compared(CANARY, book.all())
    assert (found.state, found.replicas) == ("running", 2)
    assert found.reason == "new answers 0.25 of the requests and repeats 0.5 of them."
    arm = found.figures.arms["candidate"]
    assert (arm.requests, arm.took.count, arm.took.total) == (4, 4, 10.0)
    assert (found.figures.fallbacks, found.figures.shadows) == (8, {"compared": 4})
    assert found.figures.distances.high == 0.004
    assert compared(CANARY, book.all()).figures.fallbacks == 8  # adding up changes nothing


def test_one_that_was_stopped_by_any_stays_so_for_all(book, clock):
    assert book.keep("a", [report()]) == {}
    assert book.keep("b", [report("stopped", "too far apart")]) == {CANARY.key: "too far apart"}
    assert book.keep("a", [report()]) == {CANARY.key: "too far apart"}
    book.keep("a", [report("stopped", "late")])
    found = compared(CANARY, book.all())
    assert (found.state, found.reason) == ("stopped", "too far apart")
    clock.advance(LAPSE_S + 1)
    assert book.keep("new", [report("checking")]) == {CANARY.key: "too far apart"}


def test_one_replica_that_still_checks_is_told_of(book):
    book.keep("a", [report()])
    book.keep("b", [report("checking")])
    assert compared(CANARY, book.all()).state == "checking"
    book.keep("c", [report("checking", "the model is away")])
    assert compared(CANARY, book.all()).reason == "the model is away"


def test_what_nobody_told_of_is_not_known(book, clock):
    book.keep("a", [report(key="older settings")])
    assert compared(CANARY, book.all()).state == "unknown"
    book.keep("a", [report()])
    clock.advance(LAPSE_S + 1)
    assert compared(CANARY, book.all()).state == "unknown"


def test_one_that_is_switched_off_says_so():
    off = CANARY.model_copy(update={"enabled": False})
    found = compared(off, CanaryReports((report(key=off.key),), {}))
    assert (found.state, found.replicas) == ("off", 0)
    assert "`enabled`" in found.reason


def test_what_is_held_is_bounded(book, monkeypatch):
    monkeypatch.setattr(trial_reports, "REPLICAS_MAX", 2)
    monkeypatch.setattr(trial_reports, "STOPS_MAX", 2)
    for name in "abc":
        book.keep(name, [report("stopped", name, key=name)])
    assert [one.reason for one in book.all().reports] == ["b", "c"]
    assert book.all().stops == {"b": "b", "c": "c"}

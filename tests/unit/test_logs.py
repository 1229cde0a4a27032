"""serve.logs: lines that a machine reads, with the ids that join them."""

import json
import logging
from collections.abc import Iterator

import pytest

from serve import logs, tracing


@pytest.fixture
def _as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in logs.LOGGERS]
    kept = [(one, one.handlers, one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in kept:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.fixture
def said(capsys, _as_before):
    """Everything that was written, line by line."""
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_an_object_with_what_there_is(said):
    logs.begin("worker", "INFO")
    logging.getLogger("headrace.api").warning("it took %d s", 3)
    (line,) = said()
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "WARNING",
        "logger": "headrace.api",
        "process": "worker",
        "message": "it took 3 s",
    }


def test_ids_of_request_and_trace_are_in_it(said):
    logs.begin("worker", "INFO")
    tracing.begin("headrace", "test", [Ignored()])
    token = logs.REQUEST.set("req_1")
    try:
        with tracing.arrival(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"):
            logging.getLogger("serve.jobs.committer").error("away")
            span = tracing.carrier().split("-")[2]
    finally:
        logs.REQUEST.reset(token)
        tracing.end()
    (line,) = said()
    assert line["request_id"] == "req_1"
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["span_id"] == span


def test_an_exception_stands_in_one_line(said):
    logs.begin("worker", "INFO")
    logging.getLogger("headrace.worker").error("failed", exc_info=ValueError("two\nlines"))
    (line,) = said()
    assert "ValueError: two\nlines" in line["error"]


def test_less_than_the_level_and_others_are_not_ours(said):
    logs.begin("worker", "INFO")
    logging.getLogger("headrace.api").debug("details")
    logging.getLogger("else").info("whatever")
    assert said() == []


def test_beginning_twice_says_nothing_twice(said):
    logs.begin("worker", "INFO")
    logs.begin("worker", "INFO")
    logging.getLogger("headrace.api").info("once")
    assert len(said()) == 1


class Ignored:
    """A span processor."""

    def on_start(self, *_: object, **__: object) -> None: ...
    def _on_ending(self, *_: object) -> None: ...
    def on_end(self, *_: object) -> None: ...
    def shutdown(self) -> None: ...

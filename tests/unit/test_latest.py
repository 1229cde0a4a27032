"""What a writer remembers of its own writes."""

from serve.index.latest import GONE, Latest


def test_it_knows_what_was_kept_until_a_write_begins():
    latest = Latest(10)
    latest.keep("n", [("a", 5), ("b", GONE)])
    latest.keep("m", [("a", 7)])
    assert latest.find("n", ["a", "b", "c"]) == {"a": 5, "b": GONE}
    latest.forget("n", ["a", "x"])
    assert latest.find("n", ["a", "b"]) == {"b": GONE}
    assert latest.find("m", ["a"]) == {"a": 7}


def test_a_namespace_is_dropped_alone():
    latest = Latest(10)
    latest.keep("n", [("a", 5)])
    latest.keep("m", [("a", 7)])
    latest.drop("n")
    assert latest.find("n", ["a"]) == {}
    assert latest.find("m", ["a"]) == {"a": 7}


def test_it_is_bounded_and_forgets_what_was_written_longest_ago():
    latest = Latest(2)
    latest.keep("n", [("a", 1), ("b", 1), ("a", 2), ("c", 1)])
    assert latest.find("n", "abc") == {"a": 2, "c": 1}
    nothing = Latest(0)
    nothing.keep("n", [("a", 1)])
    assert nothing.find("n", "a") == {}

from serve.admission import usage as module
from serve.admission.usage import Report, UsageCount
from serve.records import UsageRow


def new_count(**bounds: int) -> UsageCount:
    return UsageCount("replica", "2026-11-30", **bounds)


def use(count: UsageCount, key: str = "k", tokens: int = 10, refused: int = 0) -> None:
    count.count("ann", key, "interactive", requests=1 - refused, tokens=tokens, refused=refused)


def row(key="k", month="2026-11", requests=1, tokens=10, refused=0) -> UsageRow:
    return UsageRow(month, "ann", key, "interactive", requests, tokens, refused)


def report(count: UsageCount) -> Report:
    due = next(count.due())
    count.done(due)
    return due


def test_counts_are_cumulative_and_only_what_changed_is_reported():
    count = new_count()
    use(count)
    use(count, "other")
    assert report(count).rows == (row(), row("other"))
    assert not list(count.due())
    use(count, tokens=5)
    use(count, tokens=0, refused=1)
    assert report(count).rows == (row(requests=2, tokens=15, refused=1),)


def test_what_is_not_kept_is_reported_again_and_with_what_came_since():
    count = new_count()
    use(count)
    first = next(count.due())
    use(count)
    assert first.rows == (row(),)
    count.done(first)
    assert report(count).rows == (row(requests=2, tokens=20),)
    assert not list(count.due())


def test_a_session_ends_with_its_day_and_is_reported_first():
    count = new_count()
    use(count)
    count.turn("2026-12-01")
    use(count)
    old, new = report(count), report(count)
    assert (old.rows, new.rows) == ((row(),), (row(month="2026-12"),))
    assert old.session == "replica/2026-11-30/1"
    assert new.session == "replica/2026-12-01/2"
    assert not list(count.due())


def test_rows_and_sessions_are_bounded_and_so_is_a_report(monkeypatch):
    monkeypatch.setattr(module, "REPORT_ROWS_MAX", 2)
    count = new_count(rows_max=3)
    for number in range(4):
        use(count, f"k{number}")
    reports = [report(count) for _ in range(3)]
    assert [[one.key for one in each.rows] for each in reports] == [["k0", "k1"], ["k2"], ["k3"]]
    assert len({each.session for each in reports}) == 2
    for number in range(1000):
        use(count, f"n{number}")
    assert sum(len(one.rows) for one in count._ended) <= 3 * module.SESSIONS_MAX


def test_what_changes_during_a_report_waits_for_the_next_one(monkeypatch):
    monkeypatch.setattr(module, "REPORT_ROWS_MAX", 2)
    count = new_count()
    for key in "abc":
        use(count, key)
    parts = []
    for part in count.due():
        parts.append([one.key for one in part.rows])
        assert len(parts) <= 2
        use(count, "a")
        use(count, "late")
        count.done(part)
    assert parts == [["a", "b"], ["c"]]
    assert [one.key for one in report(count).rows] == ["a", "late"]


def test_one_who_is_counted_all_the_time_keeps_nobody_from_being_reported(monkeypatch):
    monkeypatch.setattr(module, "REPORT_ROWS_MAX", 1)
    count = new_count()
    use(count, "hot")
    use(count, "cold")
    for key in ("hot", "cold"):
        (first, *_) = count.due()
        use(count, "hot")
        count.done(first)
        assert first.rows[0].key == key

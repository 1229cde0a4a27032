"""When a table is compacted: after many commits at once, after a few when it rests."""

from serve.index.lance_commits import FEW, Commits


def test_many_commits_are_due_at_once_and_a_few_after_a_rest():
    commits = Commits(most=64, rest_s=10)
    for second in range(FEW):
        commits.add("busy", second, 8)
        commits.add("slow", second)
    commits.add("new", 0, FEW - 1)
    assert commits.due(FEW) == ["busy"]
    commits.compacted("busy", FEW)
    assert commits.due(FEW + 9) == ["slow"]  # its last was at second 7
    assert commits.due(FEW + 8.9) == []
    assert "new" in commits  # too few, however long it rests


def test_a_write_wakes_a_table_that_rested():
    commits = Commits(most=64, rest_s=10)
    commits.add("one", 0, FEW)
    assert commits.due(10) == ["one"]
    commits.add("one", 10)
    assert commits.due(19) == []
    assert commits.due(20) == ["one"]


def test_one_that_is_put_off_or_gone():
    commits = Commits(most=4, rest_s=10)
    commits.add("one", 0, 4)
    commits.put_off("one", 0)
    assert commits.due(9) == []
    commits.add("one", 9, 2)
    assert commits.due(9) == ["one"]
    assert Commits(most=4, rest_s=10).due(0) == []
    commits.forget("one")
    assert commits.due(99) == []
    assert "one" not in commits

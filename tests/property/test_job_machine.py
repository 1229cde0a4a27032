"""Any use of the jobs' statements by several workers in virtual time: counts never drift, nothing is
held twice, nothing is stuck.
"""

from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.errors import Conflict
from serve.items import ENDS, JOB_ENDS, Fault, Item, NewItem, Replay, Settlement
from serve.jobs import claims, handed, progress, schema, settling, submit
from serve.jobs.book import TOTALS
from serve.jobs.job_tables import items, job_totals, jobs, owners
from tests.property.handed import LEASE_S, ROOM, claim, new_job


LEASES = claims.Leases(LEASE_S, crashes_max=4)
ATTEMPTS = 3
ROWS = 7
SLOTS = ("w1", "w2", "w3")
BUSY = Fault("network", "busy", "")

MADE = sa.create_engine("sqlite://")
with MADE.begin() as _conn:
    schema.create(_conn, 0.0)

COUNTS = sa.select(items.c.job, items.c.state, sa.func.count(), sa.func.sum(items.c.cost)).where(
    items.c.seq >= 0
)
TICKS = (
    settling.due,
    progress.go_on_moving,
    handed.expire,
    progress.tell_rest,
    submit.purge_idempotency,
)

costs = st.sampled_from([1.0, 2.5, 7.0])
words = st.sampled_from(["done", "done", "skipped", "dead", "retry", "release", "advance"])


class Workers(RuleBasedStateMachine):
    """Random submissions, claims, settlements, deaths, changes and replays."""

    def __init__(self):
        super().__init__()
        # Each example is rolled back: the Store is as it was at the start.
        self.stack = ExitStack()
        self.conn = self.stack.enter_context(MADE.connect())
        self.stack.callback(self.conn.begin().rollback)
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        for follows in (progress.move, progress.stop):
            patch.setattr(follows, "__defaults__", (2,))
        self.now = 1000.0
        self.numbers = count()
        self.tenant_of: dict[str, str] = {}
        self.names = dict.fromkeys(SLOTS, "")
        self.until: dict[str, float] = {}
        self.held: defaultdict[str, dict[int, Item]] = defaultdict(dict)
        self.newest: dict[int, int] = {}
        for slot in SLOTS:
            self.renew(slot)

    def renew(self, slot: str) -> None:
        """Another process takes the place of one that has ended."""
        self.names[slot] = f"{slot}/{next(self.numbers)}"

    # What tenants do

    @rule(
        tenant=st.sampled_from("ab"),
        klass=st.sampled_from(["interactive", "bulk"]),
        kind=st.sampled_from(["documents", "embeddings"]),
        some=st.lists(costs, max_size=8),
        weight=st.sampled_from([1.0, 4.0]),
        priority=st.sampled_from([10, 50, 90]),
        on_error=st.sampled_from(["continue", "continue", "stop"]),
        lasts_s=st.sampled_from([None, None, 30.0]),
        from_file=st.sampled_from([False, False, True]),
    )
    def hand_over(self, tenant, some, lasts_s, from_file, **fields):
        over_at = None if lasts_s is None else self.now + lasts_s
        job = new_job(next(self.numbers), tenant, expires_at=over_at, **fields)
        file = [NewItem("file", "expand", "prepare", 1.0, {})]
        new = file if from_file else self.units(some)
        submit.submit(self.conn, job, new, None, room=ROOM, now=self.now)
        self.tenant_of[job.id] = tenant

    def units(self, some: list[float]) -> list[NewItem]:
        return [NewItem("name", "request", "prepare", cost, {}) for cost in some]

    @precondition(lambda self: self.tenant_of)
    @rule(
        which=st.integers(0, 50),
        what=st.sampled_from(["cancel", "pause", "pause", "resume", "resume", "retry", "retry"]),
    )
    def change(self, which, what):
        job, tenant = list(self.tenant_of.items())[which % len(self.tenant_of)]
        with suppress(Conflict):
            if what == "retry":
                handed.retry(self.conn, tenant, job, Replay(), self.now)
            else:
                handed.change(self.conn, tenant, job, what, self.now)

    # What workers do

    @rule(
        slot=st.sampled_from(SLOTS),
        stage=st.sampled_from(["prepare", "prepare", "embed"]),
        most=st.integers(1, 6),
        cost=st.sampled_from([1.0, 8.0, 1e9]),
        arrives=st.sampled_from([True, True, True, False]),
    )
    def claim_some(self, slot, stage, most, cost, *, arrives):
        owner = self.names[slot]
        given = claim(self.conn, owner, stage, most, now=self.now, cost=cost)
        assert given is not None
        assert not given.alone or len(given.items) == 1
        if given.items:
            self.until[owner] = self.now + LEASE_S
        for item in given.items:
            for other, held in self.held.items():
                if item.id in held:
                    assert self.until[other] < self.now, "two live workers have it"
                    assert item.lease > held[item.id].lease
            self.newest[item.id] = item.lease
            job = given.jobs[item.job]
            assert not job.paused or item.seq < 0
            assert job.state not in ("cancelling", *JOB_ENDS) or item.task == "finish"
        if arrives:
            self.held[owner].update({item.id: item for item in given.items})

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def settle(self, data):
        """Also late ones, of owners that died."""
        owner = data.draw(st.sampled_from(sorted(o for o, held in self.held.items() if held)))
        held = self.held[owner]
        some = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True, min_size=1))
        given = [
            self.settlement(held.pop(each), data.draw(words), data.draw(costs)) for each in some
        ]
        applied = settling.settle(self.conn, given, attempts_max=ATTEMPTS, now=self.now)
        assert all(applied) or self.until[owner] < self.now
        assert not any(
            ok and self.newest[one.item] != one.lease
            for one, ok in zip(given, applied, strict=True)
        )
        again = settling.settle(self.conn, given, attempts_max=ATTEMPTS, now=self.now)
        assert not any(again)

    def settlement(self, item: Item, word: Any, cost: float) -> Settlement:
        if item.seq < 0 and word == "advance":
            word = "done"
        fault = BUSY if word in ("dead", "retry") else None
        delay_s = cost - 1 if word in ("retry", "release") else 0.0
        return Settlement(
            item.id, item.lease, word, tokens=1, fault=fault, delay_s=delay_s, cost=cost
        )

    @precondition(lambda self: any(self.files()))
    @rule(some=st.lists(costs, max_size=4), start=st.sampled_from([0, 0, 2, 4]))
    def read_file(self, some, start):
        file = next(self.files())
        submit.add_items(
            self.conn,
            file.id,
            file.lease,
            start=start,
            new=self.units(some),
            room=ROOM,
            now=self.now,
        )

    def files(self):
        return (
            item for held in self.held.values() for item in held.values() if item.task == "expand"
        )

    @rule(
        slot=st.sampled_from(SLOTS),
        stage=st.sampled_from(["prepare", "embed"]),
        most=st.integers(1, 9),
        word=words,
        cost=costs,
    )
    def work(self, slot, stage, most, word, cost):
        """Claim and settle, as nearly always."""
        before = set(self.held[self.names[slot]])
        self.claim_some(slot, stage, most, 1e9, arrives=True)
        held = self.held[self.names[slot]]
        new = [held.pop(each) for each in set(held) - before]
        given = [self.settlement(item, word, cost) for item in new]
        assert all(settling.settle(self.conn, given, attempts_max=ATTEMPTS, now=self.now))

    @rule(slot=st.sampled_from(SLOTS))
    def die(self, slot):
        self.renew(slot)

    @rule(slot=st.sampled_from(SLOTS))
    def leave(self, slot):
        owner = self.names[slot]
        claims.leave(self.conn, owner, self.now)
        late = claim(self.conn, owner, "prepare", 9, now=self.now)
        assert late is None or not late.items
        self.held[owner].clear()
        self.renew(slot)

    @rule(steps=st.integers(1, 5), step_s=st.sampled_from([0.3, 1.0, 5.0]))
    def time_passes(self, steps, step_s):
        for _ in range(steps):
            self.now += step_s
            for owner in self.names.values():
                self.keep(owner)
            self.tick()

    def keep(self, owner: str) -> None:
        held = self.held[owner]
        alive = self.until.get(owner, self.now) >= self.now
        dropped = claims.keep(self.conn, owner, list(held), lease_s=LEASE_S, now=self.now)
        assert not dropped or not alive
        self.until[owner] = self.now + LEASE_S
        for each in dropped:
            del held[each]

    def tick(self) -> None:
        claims.reap(self.conn, self.now, ROWS, leases=LEASES)
        for chore in TICKS:
            while chore(self.conn, self.now, ROWS) >= ROWS:
                pass

    # What always holds

    @invariant()
    def counts_are_those_of_the_items(self):
        found: dict[str, Counter[str]] = defaultdict(Counter)
        left: dict[str, float] = defaultdict(float)
        for job, state, number, cost in self.conn.execute(
            COUNTS.group_by(items.c.job, items.c.state)
        ):
            found[job][state] += number
            left[job] += 0.0 if state in ENDS else cost
        sums: dict[str, Counter[str]] = defaultdict(Counter)
        for row in self.conn.execute(sa.select(jobs)):
            counts = found[row.id]
            assert row.total == counts.total()
            assert all(getattr(row, state) == counts[state] for state in ENDS)
            assert row.cost_left == pytest.approx(left[row.id])
            if row.state in JOB_ENDS:
                assert counts.total() == sum(counts[state] for state in ENDS)
            assert (row.finished_at is not None) == (row.state in JOB_ENDS)
            sums[row.tenant].update({name: getattr(row, name) for name in TOTALS})
            sums[row.tenant]["open"] += row.state not in JOB_ENDS
        for row in self.conn.execute(sa.select(job_totals)):
            kept = sums[row.tenant]
            assert {name: getattr(row, name) for name in kept} == pytest.approx(dict(kept))

    @invariant()
    def items_have_followed_their_jobs(self):
        """But for those that a tick will come to."""
        waits = items.c.state.in_(("ready", "delayed", "paused"))
        stopped = jobs.c.state.in_(("cancelling", *JOB_ENDS)) & (items.c.task != "finish") & waits
        held = jobs.c.paused & (items.c.state == "ready") & (items.c.seq >= 0)
        freed = sa.not_(jobs.c.paused) & (items.c.state == "paused")
        wrong = (
            sa.select(items.c.id)
            .join(jobs, jobs.c.id == items.c.job)
            .where(sa.not_(jobs.c.moving), stopped | held | freed)
        )
        assert self.conn.execute(wrong).all() == []

    @invariant()
    def what_is_leased_has_an_owner_that_can_be_missed(self):
        known = sa.select(owners.c.owner)
        lost = sa.select(items.c.id).where(items.c.state == "leased", items.c.owner.not_in(known))
        assert self.conn.execute(lost).first() is None

    def teardown(self):
        """Whatever happened, all comes to an end once somebody works."""
        for job, tenant in self.tenant_of.items():
            with suppress(Conflict):
                handed.change(self.conn, tenant, job, "resume", self.now)
        open_ = sa.select(jobs.c.id).where(jobs.c.finished_at.is_(None))
        for _ in range(200):
            if self.conn.execute(open_).first() is None:
                break
            self.now += 8
            self.tick()
            for stage in ("prepare", "embed"):
                claimed = claim(self.conn, "last", stage, 100, now=self.now)
                done = [Settlement(item.id, item.lease, "done") for item in claimed.items]
                assert all(settling.settle(self.conn, done, attempts_max=ATTEMPTS, now=self.now))
        self.counts_are_those_of_the_items()
        assert self.conn.execute(open_).all() == []
        self.stack.close()


TestWorkers = Workers.TestCase
TestWorkers.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)

"""Any use of the fair queue, against its definition written down in lists."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from serve.admission.fairness import Entry, FairQueue
from serve.records import Klass


SHARES: dict[Klass, float] = {"interactive": 8, "bulk": 1}
"""Powers of two, as are the weights: both sides compute the same numbers exactly."""

klasses = st.sampled_from(list(SHARES))
tenants = st.sampled_from("abc")
weights = st.sampled_from([0.5, 1, 4, 16])


class Definition:
    """The rule in the text of `serve.admission.fairness`, looked up anew at every step."""

    def __init__(self):
        self.waiting: list[Entry] = []
        self.weight: dict[tuple[Klass, str], float] = {}
        self.finish: dict[tuple[Klass, str], float] = {}
        self.turn: dict[tuple[Klass, str], int] = {}
        self.v = dict.fromkeys(SHARES, 0.0)
        self.root = dict.fromkeys(SHARES, 0.0)
        self.root_v = 0.0
        self.turns = 0

    def of(self, klass, tenant=None):
        return [e for e in self.waiting if e.klass == klass and tenant in (None, e.tenant)]

    def tag(self, flow):
        """`finish` of a waiting flow is its S."""
        self.finish[flow] = max(self.v[flow[0]], self.finish.get(flow, 0.0))
        self.turns += 1
        self.turn[flow] = self.turns

    def move(self, flow, start):
        if start != self.finish[flow]:
            self.finish[flow] = start
            if self.of(*flow):
                self.tag(flow)

    def push(self, entry, weight):
        flow = entry.klass, entry.tenant
        if not self.waiting:
            self.root_v = max(self.root.values())
        self.reweigh(entry.tenant, weight)
        if not self.of(entry.klass):
            self.root[entry.klass] = max(self.root[entry.klass], self.root_v)
        if not self.of(*flow):
            self.weight[flow] = weight
            self.tag(flow)
        self.waiting.append(entry)

    def reweigh(self, tenant, weight):
        for klass in SHARES:
            flow = klass, tenant
            if flow in self.finish:
                v, lead = self.v[klass], self.finish[flow] - self.v[klass]
                old, self.weight[flow] = self.weight[flow], weight
                if old != weight:
                    self.move(flow, v + lead * (old / weight))

    def settle(self, klass, tenant, diff):
        self.root[klass] = max(self.root[klass] + diff / SHARES[klass], self.root_v)
        flow = klass, tenant
        if flow in self.finish:
            self.move(flow, self.finish[flow] + diff / self.weight[flow])

    def remove(self, entry):
        self.waiting.remove(entry)
        klass, flow = entry.klass, (entry.klass, entry.tenant)
        if not self.of(*flow) and self.finish[flow] <= self.v[klass]:
            del self.finish[flow]
        if not self.of(klass):
            self.finish = {one: f for one, f in self.finish.items() if one[0] != klass}
            self.v[klass] = 0.0

    def next(self):
        klass = min((k for k in SHARES if self.of(k)), key=self.root.__getitem__)
        flows = {(klass, entry.tenant) for entry in self.of(klass)}
        flow = min(flows, key=lambda one: (self.finish[one], self.turn[one]))
        return max(self.of(*flow), key=lambda entry: (entry.priority, -entry.number))

    def pop(self, entry):
        klass, flow = entry.klass, (entry.klass, entry.tenant)
        self.root_v = self.root[klass]
        self.root[klass] += entry.cost / SHARES[klass]
        self.v[klass] = self.finish[flow]
        self.finish[flow] += entry.cost / self.weight[flow]
        self.remove(entry)
        if self.of(*flow):
            self.tag(flow)

    def take(self, admits, live):
        out = []
        while self.waiting:
            entry = self.next()
            if not live(entry.item):
                self.remove(entry)
                continue
            if not admits(entry.item):
                break
            self.pop(entry)
            out.append(entry.item)
        return out


class AnyUse(RuleBasedStateMachine):
    """Random push, take, cancel, settle and reweigh."""

    entries = Bundle("entries")

    def __init__(self):
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(SHARES)
        self.rule = Definition()
        self.dead: set[int] = set()
        self.cost_of: dict[int, float] = {}

    @rule(
        target=entries,
        klass=klasses,
        tenant=tenants,
        weight=weights,
        cost=st.integers(1, 100),
        count=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 7, 100]),
    )
    def push(self, klass, tenant, *, weight, cost, count, priority):
        item = len(self.cost_of)
        self.cost_of[item] = cost
        entry = self.queue.push(
            klass, tenant, weight=weight, cost=cost, item=item, count=count, priority=priority
        )
        self.rule.push(entry, weight)
        return entry

    @rule(entry=entries)
    def cancel(self, entry):
        """Also what was cancelled or handed out before."""
        self.queue.cancel(entry)
        if entry in self.rule.waiting:
            self.rule.remove(entry)
        assert not entry.waiting

    @rule(entry=entries)
    def depart(self, entry):
        """The caller left, and only `live` will tell."""
        self.dead.add(entry.item)

    @rule(klass=klasses, tenant=tenants, diff=st.integers(-200, 200))
    def settle(self, klass, tenant, diff):
        self.queue.settle(klass, tenant, diff)
        self.rule.settle(klass, tenant, diff)

    @rule(tenant=tenants, weight=weights)
    def reweigh(self, tenant, weight):
        self.queue.reweigh(tenant, weight)
        self.rule.reweigh(tenant, weight)

    @precondition(lambda self: self.rule.waiting)
    @rule(room=st.integers(1, 300))
    def take(self, room):
        alive = [entry for entry in self.rule.waiting if entry.item not in self.dead]
        outs, refused = [], []
        for queue in (self.rule, self.queue):
            left = [room]

            def admits(item, left=left):
                left.append(left[-1] - self.cost_of[item])
                refused.extend([item] * (left[-1] < 0))
                return left[-1] >= 0

            outs.append(queue.take(admits, lambda item: item not in self.dead))
        assert outs[1] == outs[0]
        assert outs[1] or refused or not alive, "work waited and nothing was handed out"

    @invariant()
    def the_same_waits(self):
        queue, waiting = self.queue, self.rule.waiting
        assert queue.items == sum(entry.count for entry in waiting)
        assert queue.cost == sum(entry.cost for entry in waiting)
        assert all(entry.waiting for entry in waiting)
        for tenant in "abc":
            own = [entry for entry in waiting if entry.tenant == tenant]
            assert queue.backlog(tenant) == sum(entry.cost for entry in own)
            assert queue.backlog_items(tenant) == sum(entry.count for entry in own)

    @invariant()
    def shares_are_of_who_waits(self):
        for klass, share in SHARES.items():
            busy = {entry.klass for entry in self.rule.waiting} | {klass}
            of_class = share / sum(SHARES[one] for one in busy)
            names = {entry.tenant for entry in self.rule.of(klass)}
            for tenant in "abc":
                others = sum(self.rule.weight[klass, name] for name in names - {tenant})
                assert self.queue.backlog(tenant, klass) == sum(
                    entry.cost for entry in self.rule.of(klass, tenant)
                )
                assert self.queue.share(klass, tenant, 2) == pytest.approx(
                    of_class * 2 / (2 + others)
                )

    @invariant()
    def every_waiting_flow_has_one_row(self):
        for q in self.queue._classes.values():
            rows = [row for row in q.heap if row[1] == row[2].turn]
            assert len(rows) == len(q.flows)
            assert all(row[0] == row[2].start >= q.v for row in rows)


AnyUse.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyUse = AnyUse.TestCase

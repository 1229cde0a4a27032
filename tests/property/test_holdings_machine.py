"""Whatever happens to the models of a pool: nothing in use leaves, memory is bounded, nobody starves."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve.config import Model, Pool
from serve.embedding.holdings import Holdings, Step
from serve.errors import ModelUnavailable


SIZES = {"p": 20, "a": 30, "b": 50, "c": 70, "huge": 90}
MOST = 100
SWAP_S = 2.0
NAMES = st.sampled_from(list(SIZES))


def pool() -> Pool:
    models = [
        Model(
            id=name,
            engine="fake",
            dimensions=8,
            tokens_max=64,
            pinned=name == "p",
            unload_after_s=20 if name == "a" else None,
        )
        for name in SIZES
    ]
    return Pool(models=models, memory_bytes_max=MOST, swap_after_s=SWAP_S, load_retry_s_max=8)


class HoldingsMachine(RuleBasedStateMachine):
    """`queued` and `parked` calls by model; `step` is what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.holdings = Holdings(pool())
        self.now = 0.0
        self.queued = dict.fromkeys(SIZES, 0)
        self.parked = dict.fromkeys(SIZES, 0)
        self.loaded = {"p"}
        self.broken: set[str] = set()
        self.step: Step | None = None
        self.holdings.loaded("p", SIZES["p"], 0)

    # --- calls ------------------------------------------------------------------------------

    @rule(name=NAMES)
    def arrive(self, name: str) -> None:
        try:
            may_run = self.holdings.enter(name, self.now)
        except ModelUnavailable as refused:
            retry_s = refused.retry_after_s
            assert 0 < retry_s <= 8
            assert name not in self.loaded or name in self.broken
            return
        if may_run:
            assert name in self.loaded
            assert name not in self.broken
            self.queued[name] += 1
        else:
            self.parked[name] += 1

    @rule(name=NAMES)
    def end(self, name: str) -> None:
        if self.queued[name]:
            self.queued[name] -= 1
            self.holdings.leave(name, self.now)

    @rule(name=NAMES)
    def give_up(self, name: str) -> None:
        if self.parked[name]:
            self.parked[name] -= 1
            if not self.parked[name]:
                self.holdings.forget(name, self.now)
                self._unpark()

    def _unpark(self) -> None:
        for name in SIZES:
            while self.parked[name] and self.holdings.is_open(name):
                assert self.holdings.enter(name, self.now)
                self.parked[name] -= 1
                self.queued[name] += 1

    def _refuse(self, name: str) -> None:
        """Every call of it is answered with an error."""
        if self.parked[name]:
            self.parked[name] = 0
            self.holdings.forget(name, self.now)
        while self.queued[name]:
            self.queued[name] -= 1
            self.holdings.leave(name, self.now)

    # --- time and loads ---------------------------------------------------------------------

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def look(self) -> None:
        step = self.holdings.step(self.now)
        if step is None:
            return
        assert self.step is None, "two at a time"
        self.step = step
        if step.word == "unload":
            assert step.model in self.loaded
            assert self.queued[step.model] == 0
            assert step.model != "p" or "p" in self.broken
            assert not self.holdings.is_open(step.model)
        else:
            assert step.model not in self.loaded
        if step.word == "load":
            assert self.parked[step.model] or step.model == "p"
            assert self.bytes + SIZES[step.model] <= MOST or not self._known(step.model)

    @precondition(lambda self: self.step is not None)
    @rule(works=st.booleans())
    def finish(self, works: bool) -> None:
        step, self.step = self.step, None
        if step.word == "unload":
            self.holdings.unloaded(step.model)
            self.loaded.discard(step.model)
            self.broken.discard(step.model)
        elif step.word == "load" and works:
            self.seen.add(step.model)
            self.loaded.add(step.model)
            self.holdings.loaded(step.model, SIZES[step.model], self.now)
        else:
            self.holdings.failed(step.model, self.now)
            self._refuse(step.model)
        self._unpark()

    @rule(name=NAMES)
    def break_down(self, name: str) -> None:
        if self.holdings.is_open(name):
            self.broken.add(name)
            self.holdings.broke(name, self.now)
            self._refuse(name)
            self._unpark()

    @rule(name=NAMES)
    def work(self, name: str) -> None:
        if self.holdings.is_open(name):
            self.holdings.worked(name)

    # --- what always holds --------------------------------------------------------------------

    seen: set[str]

    def _known(self, name: str) -> bool:
        """Whether its size was measured; before, a load may exceed the bound."""
        return name in self.seen or name == "p"

    @property
    def bytes(self) -> int:
        return sum(SIZES[name] for name in self.loaded)

    @invariant()
    def the_books_agree(self) -> None:
        assert self.holdings.bytes == self.bytes
        counts = self.holdings.counts()
        assert {name for name, (_, size) in counts.items() if size} == self.loaded

    @invariant()
    def what_waits_can_run_or_has_a_reason_to_wait(self) -> None:
        for name, count in self.parked.items():
            assert not (count and self.holdings.is_open(name))

    def teardown(self) -> None:
        """From here on every load works and every call ends: all who wait are served, soon."""
        for _ in range(60):
            self.now += SWAP_S + 8
            self._everything_works()
        assert not any(self.parked.values()), "somebody starves"
        assert self.bytes <= MOST

    def _everything_works(self) -> None:
        for name in SIZES:
            while self.queued[name]:
                self.end(name)
        if self.step is None:
            self.look()
        if self.step is not None:
            self.finish(works=True)


class KnownSizes(HoldingsMachine):
    """Sizes are known from profiles: then no load ever exceeds the bound."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set(SIZES)
        for name, size in SIZES.items():
            if name != "p":
                self.holdings.expect(name, size)

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.bytes <= MOST


class UnknownSizes(HoldingsMachine):
    """Sizes show at the first load: then what is too much leaves before it is served."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestKnownSizes = KnownSizes.TestCase
TestKnownSizes.settings = SETTINGS
TestUnknownSizes = UnknownSizes.TestCase
TestUnknownSizes.settings = SETTINGS

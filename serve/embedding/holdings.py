"""Which models a pool holds, which it loads next, and which have to leave. Pure.

A model that is not loaded is *wanted* by its first call. One thing is under way at a time: a load
or an unload. Models are loaded in the order in which they were wanted; where memory is short, the
unpinned ones that nothing uses leave first, least recently used first. When those are not enough
and the wait has been long, the ones held longest are *drained*: their new calls wait as well, what
is queued of them is done, then they leave. So nothing is unloaded that is in use, and every model
that is wanted has its turn. `serve.flows.loading` does what `step` says.
"""

from dataclasses import dataclass, field
from typing import Literal

from serve.config import Pool
from serve.errors import ModelUnavailable, NotFound


@dataclass(frozen=True, slots=True)
class Step:
    """What is next for a model: a load, an unload, or a refusal, as there will never be room."""

    word: Literal["load", "unload", "refuse"]
    model: str


@dataclass(slots=True)
class Counts:
    """Of one model since the replica started: `breaks` are those on a known good input, and the
    unload that follows is no eviction.
    """

    loads: int = 0
    load_failures: int = 0
    breaks: int = 0
    evictions: int = 0


@dataclass(slots=True)
class Held:
    """One model: `bytes` are expected until it is loaded, then measured.

    `uses` are its queued calls and its hand-out at the model. `doomed`: it leaves once it has none,
    or is being unloaded.
    `failures` are those since it last made a vector; `broken`: one of them was a probe's.
    """

    pinned: bool
    unload_after_s: float | None
    bytes: int = 0
    loaded: bool = False
    doomed: bool = False
    draining: bool = False
    broken: bool = False
    uses: int = 0
    used_at: float = 0.0
    loaded_at: float = 0.0
    wanted_at: float = 0.0
    failures: int = 0
    retry_at: float = 0.0
    counts: Counts = field(default_factory=Counts)

    @property
    def open(self) -> bool:
        """Whether new work of it may be queued."""
        return self.loaded and not self.doomed and not self.draining

    @property
    def idle(self) -> bool:
        """Whether it may leave to make room."""
        return self.loaded and not (self.pinned or self.doomed or self.uses)


class Holdings:
    """The models of one pool, by id. `bytes_max` bounds those that are loaded together."""

    def __init__(self, settings: Pool) -> None:
        self._settings = settings
        self._held = {
            model.id: Held(model.pinned, model.unload_after_s) for model in settings.models
        }
        self._waiting: list[str] = []
        self._under_way: Step | None = None
        self._began = 0.0
        self.bytes_max = settings.memory_bytes_max

    # --- who uses what --------------------------------------------------------------------

    def enter(self, model_id: str, now: float) -> bool:
        """Whether a call may be queued now: then it uses the model until it leaves.

        If not, it has to wait, and the model is wanted. Raises NotFound, and ModelUnavailable while
        a model that failed is not tried again.
        """
        held = self._find(model_id)
        if held.retry_at > now:
            raise ModelUnavailable(
                f"The model {model_id} failed and is tried again later.",
                retry_after_s=held.retry_at - now,
            )
        if held.open:
            self._unwant(model_id)
            held.uses += 1
            return True
        self._want(model_id, now)
        return False

    def hold(self, model_id: str) -> None:
        """A hand-out of it is at the model: a use as well."""
        self._held[model_id].uses += 1

    def leave(self, model_id: str, now: float) -> None:
        """A use has ended."""
        held = self._held[model_id]
        held.uses -= 1
        held.used_at = now

    def forget(self, model_id: str, now: float) -> None:
        """Nobody waits for it any more; a pinned model is wanted all the same."""
        first = self._first_absent(now)
        if not self._held[model_id].pinned:
            self._unwant(model_id)
        if self._first_absent(now) != first:  # it was for this one that others were drained
            self._open_all()

    def is_open(self, model_id: str) -> bool:
        """Whether new work of it may be queued. Raises NotFound."""
        return self._find(model_id).open

    # --- what is next ---------------------------------------------------------------------

    def step(self, now: float) -> Step | None:
        """What is to be done now, if anything; nothing more until its end was told.

        A model that is being unloaded takes no more work: its new calls wait until it is back.
        """
        if self._under_way is not None:
            return None
        self._under_way, self._began = self._next(now), now
        if self._under_way is not None and self._under_way.word == "unload":
            self._held[self._under_way.model].doomed = True
        return self._under_way

    def due(self, now: float) -> float | None:
        """When `step` may say more although nothing has happened."""
        times = [
            held.retry_at if held.retry_at > now else held.wanted_at + self._settings.swap_after_s
            for held in map(self._held.__getitem__, self._waiting)
        ]
        times += [
            held.used_at + held.unload_after_s
            for held in self._held.values()
            if held.idle and held.unload_after_s is not None
        ]
        return min((at for at in times if at > now), default=None)

    def _next(self, now: float) -> Step | None:
        for model_id, held in self._held.items():
            if held.doomed and not held.uses:
                return Step("unload", model_id)
        first = self._first_absent(now)  # nobody overtakes it
        room = None if first is None else self._make_room(first, now)
        return room or self._outlasted(now)

    def _make_room(self, model_id: str, now: float) -> Step | None:
        need = self._held[model_id].bytes
        if self.bytes_max is None:
            return Step("load", model_id)
        if need > self._capacity(model_id):
            return Step("refuse", model_id)
        excess = self.bytes + need - self.bytes_max
        if excess <= 0:
            return Step("load", model_id)
        idle = self._idle()
        if sum(self._held[one].bytes for one in idle) >= excess:
            return Step("unload", idle[0])
        if self._held[model_id].wanted_at + self._settings.swap_after_s <= now:
            self._drain(excess)
        return None

    def _outlasted(self, now: float) -> Step | None:
        """Whoever has been idle for as long as its settings allow."""
        for model_id in self._idle():
            held = self._held[model_id]
            if held.unload_after_s is not None and held.used_at + held.unload_after_s <= now:
                return Step("unload", model_id)
        return None

    # --- what became of it ----------------------------------------------------------------

    def loaded(self, model_id: str, size_bytes: int, now: float) -> None:
        """It is loaded, and has that size. Where that is too much, idle ones leave or it does, to
        be loaded again if somebody still waits for it.
        """
        held = self._held[model_id]
        wanted = model_id in self._waiting
        self._under_way = None
        self._unwant(model_id)
        self._open_all()
        held.loaded, held.bytes, held.retry_at = True, size_bytes, 0.0
        held.loaded_at = held.used_at = now
        held.counts.loads += 1
        excess = 0 if self.bytes_max is None else self.bytes - self.bytes_max
        idle = [one for one in self._idle() if one != model_id]
        if excess > sum(self._held[one].bytes for one in idle):
            held.doomed = True
            self._waiting[:0] = [model_id] if wanted else []
            return
        for one in idle:
            if excess > 0:
                self._held[one].doomed = True
                excess -= self._held[one].bytes

    def unloaded(self, model_id: str) -> None:
        """It is gone."""
        held = self._held[model_id]
        self._under_way = None
        held.counts.evictions += not held.broken
        held.loaded = held.doomed = held.draining = False

    def failed(self, model_id: str, now: float) -> None:
        """It could not be loaded. A pinned one is tried again by itself."""
        held = self._held[model_id]
        self._under_way = None
        held.counts.load_failures += 1
        self._back_off(held, now)
        self._unwant(model_id)
        self._open_all()
        if held.pinned:
            self._want(model_id, now)

    def broke(self, model_id: str, now: float) -> None:
        """It fails on a known good input: it leaves. A pinned one is loaded again at once."""
        held = self._held[model_id]
        held.doomed = held.broken = True
        held.counts.breaks += 1
        self._back_off(held, now)
        if held.pinned:
            held.retry_at = now if held.failures == 1 else held.retry_at
            self._want(model_id, now)

    def worked(self, model_id: str) -> None:
        """It made a vector."""
        held = self._held[model_id]
        held.failures, held.broken = 0, False

    # --- what others ask ------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Of the models that are loaded."""
        return sum(held.bytes for held in self._held.values() if held.loaded)

    @property
    def lost(self) -> bool:
        """Whether a model broke, its reload did not help, and no other model works."""
        hopeless = any(held.broken and held.failures > 1 for held in self._held.values())
        return hopeless and not any(held.loaded and not held.doomed for held in self._held.values())

    def check(self, now: float) -> None:
        """Raises ModelUnavailable when the reload of a model that broke hangs and no other is open."""
        step, most_s = self._under_way, self._settings.reload_s_max
        if step is None or not self._held[step.model].broken or now - self._began <= most_s:
            return
        if not any(held.open for held in self._held.values()):
            raise ModelUnavailable(f"The model {step.model} is not back after {most_s:g} s.")

    @property
    def settled(self) -> bool:
        """Whether all is loaded and stays, so that the end of a use makes nothing possible."""
        return all(held.pinned and held.open for held in self._held.values())

    def suspects(self, model_id: str) -> list[str]:
        """Models that are open beside one that broke, which may have lost their device as well."""
        if not self._held[model_id].broken:
            return []
        return [one for one, held in self._held.items() if held.open]

    def counts(self) -> dict[str, tuple[Counts, int]]:
        """By model: what happened, and the bytes that it holds now."""
        return {
            model_id: (held.counts, held.bytes if held.loaded else 0)
            for model_id, held in self._held.items()
        }

    def expect(self, model_id: str, size_bytes: int) -> None:
        """Its likely size, before it is loaded."""
        self._held[model_id].bytes = size_bytes

    def retry_s(self, model_id: str, now: float) -> float:
        """Seconds until it is tried again, at least the first of them."""
        return max(self._held[model_id].retry_at - now, self._settings.load_retry_s)

    # --- inside ---------------------------------------------------------------------------

    def _find(self, model_id: str) -> Held:
        try:
            return self._held[model_id]
        except KeyError:
            raise NotFound(
                f"The model {model_id!r} is not in pool {self._settings.name}.",
                param="model",
                code="model_not_found",
            ) from None

    def _want(self, model_id: str, now: float) -> None:
        if model_id not in self._waiting:
            self._waiting.append(model_id)
            self._held[model_id].wanted_at = now

    def _unwant(self, model_id: str) -> None:
        if model_id in self._waiting:
            self._waiting.remove(model_id)

    def _first_absent(self, now: float) -> str | None:
        """The next one to be loaded, of those that may be tried."""
        for model_id in self._waiting:
            held = self._held[model_id]
            if not held.loaded and held.retry_at <= now:
                return model_id
        return None

    def _idle(self) -> list[str]:
        """Least recently used first."""
        idle = [model_id for model_id, held in self._held.items() if held.idle]
        return sorted(idle, key=lambda model_id: self._held[model_id].used_at)

    def _capacity(self, model_id: str) -> float:
        """What a model may have at most: all but the other pinned ones."""
        others = (held for one, held in self._held.items() if held.pinned and one != model_id)
        return (self.bytes_max or 0) - sum(held.bytes for held in others)

    def _drain(self, excess: float) -> None:
        """Close those that were held longest, until the ones that are closed make room enough."""
        movable = [held for held in self._held.values() if held.loaded and not held.pinned]
        room = sum(held.bytes for held in movable if held.draining)
        for held in sorted(movable, key=lambda one: one.loaded_at):
            if room >= excess:
                break
            if not held.draining:
                held.draining = True
                room += held.bytes

    def _open_all(self) -> None:
        for held in self._held.values():
            held.draining = False

    def _back_off(self, held: Held, now: float) -> None:
        first, most = self._settings.load_retry_s, self._settings.load_retry_s_max
        held.failures += 1
        held.retry_at = now + min(first * 2.0 ** min(held.failures - 1, 20), most)

"""A canary as it runs in one replica: which requests the candidate answers or repeats, what came of it, and
whether it goes on. Pure: values and times in. `serve.flows.canaries` does what is decided here.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

import numpy as np

from serve.canary import Arm, CanaryReport, Figures, ShadowEnd, State
from serve.config import Canary
from serve.flows.models import Served
from serve.records import Caller, EmbedReply, TokenIds, Vector
from serve.telemetry import Samples


Course = Literal["stable", "candidate", "shadow"]
"""Who answers a request: the stable model, the candidate, or the stable one and the candidate repeats it."""

TRIES, TRIES_MIN = 50, 20
"""Last requests of the candidate that are judged by how many fell back, and the fewest that are."""

CHECK_EVERY_S = 60.0
CHECK_AGAIN_S = 5.0
"""How often the candidate shows by our own texts that its vectors are the same, and after a check that came to nothing."""


@dataclass(frozen=True, slots=True)
class Shadow:
    """A request that the stable model has answered, to be repeated. `texts` is None where ids were sent."""

    request_id: str
    texts: Sequence[str] | None
    ids: Sequence[TokenIds]
    reply: EmbedReply


@dataclass(frozen=True, slots=True)
class Miss:
    """A request that the candidate did not answer, by the code of an error; `hurried` is one whose caller left it
    less than its patience, which says nothing of it.
    """

    why: str
    hurried: bool = False


@dataclass(slots=True)
class Tally:
    """What a process has counted of all its canaries since it began, by the id of the stable model."""

    requests: Counter[tuple[str, Arm]] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    shadows: Counter[tuple[str, ShadowEnd]] = field(default_factory=Counter)
    took: Samples = field(default_factory=Samples)
    infer: Samples = field(default_factory=Samples)
    cosines: Samples = field(default_factory=Samples)


def fraction(canary: Canary, tenant: str, ids: Sequence[TokenIds]) -> float:
    """Where in 0..1 a request falls: the same one of the same tenant always at the same place."""
    salt = f"{canary.model}\0{canary.to}\0{tenant}\0".encode()
    digest = blake2b(salt, digest_size=8)
    for row in ids:
        digest.update(len(row).to_bytes(4, "little"))
        digest.update(row.tobytes())
    return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53  # what a float holds: below 1


def concerns(canary: Canary, caller: Caller) -> bool:
    """Whether it applies to the caller's requests."""
    tenant, tier = caller.tenant, caller.tier
    if tenant in canary.except_tenants or tier in canary.except_tiers:
        return False
    everybody = not canary.tenants and not canary.tiers
    return everybody or tenant in canary.tenants or tier in canary.tiers


def course(canary: Canary, place: float) -> Course:
    """Who answers what falls there. A larger `share` or `shadow` takes away from the rest only."""
    if place < canary.share:
        return "candidate"
    return "shadow" if place >= 1 - canary.shadow else "stable"


class Trial:
    """One canary in one replica, from when its settings came until others take their place."""

    def __init__(
        self, canary: Canary, stable: Served, candidate: Served, tally: Tally, now: float
    ) -> None:
        self.canary, self.key = canary, canary.key
        self.stable, self.candidate = stable, candidate
        self.reads_ids = stable.tokenizer.made_of == candidate.tokenizer.made_of
        self.figures = Figures()
        self.state: State = "checking" if canary.share > 0 else "running"
        self.reason = ""
        self._tally = tally
        self._tries: deque[bool] = deque(maxlen=TRIES)
        self._waiting: deque[Shadow] = deque()
        self._waiting_inputs = 0
        self._busy = 0
        self._check_at = now
        if canary.same_vectors and not self.reads_ids:
            self.stop(f"{canary.to} reads texts by another tokenizer than {canary.model}.")

    # --- requests -------------------------------------------------------------------------

    def course(self, caller: Caller, ids: Sequence[TokenIds]) -> Course | None:
        """Who answers a request; None: the canary does not apply to it."""
        if self.state == "stopped" or not concerns(self.canary, caller):
            return None
        found = course(self.canary, fraction(self.canary, caller.tenant, ids))
        if found == "candidate" and not (self.state == "running" and self._fits(ids)):
            return "stable"
        return found

    def _fits(self, ids: Sequence[TokenIds]) -> bool:
        return all(len(row) <= self.candidate.tokens_max for row in ids)

    def answered(self, arm: Arm, reply: EmbedReply, took_s: float) -> None:
        """An arm has answered a request: only if it computed all of it, the time says something of it."""
        self.figures.arms[arm].requests += 1
        self._tally.requests[self.canary.model, arm] += 1
        if arm == "candidate":
            self._judge(fell_back=False)
        if not reply.cached:
            self.figures.arms[arm].took.add(took_s)
            self._tally.took.add(took_s, self.canary.model, arm)
            self._ran(arm, reply)

    def fell_back(self, miss: Miss) -> None:
        """The candidate did not answer, and the stable model has."""
        self.figures.fallbacks += 1
        self._tally.fallbacks[self.canary.model] += 1
        if not miss.hurried:
            self._judge(fell_back=True, why=miss.why)

    def _judge(self, *, fell_back: bool, why: str = "") -> None:
        self._tries.append(fell_back)
        failed, tried = sum(self._tries), len(self._tries)
        if fell_back and tried >= TRIES_MIN and failed > self.canary.fallback_max * tried:
            self.stop(f"{failed} of its last {tried} requests fell back, the last one for {why}.")

    def _ran(self, arm: Arm, reply: EmbedReply) -> None:
        if reply.infer_ms > 0:  # else others were computing the same
            self.figures.arms[arm].infer.add(reply.infer_ms / 1e3)
            self._tally.infer.add(reply.infer_ms / 1e3, self.canary.model, arm)

    # --- what is repeated -----------------------------------------------------------------

    def offer(self, shadow: Shadow, tokens_max: int) -> None:
        """Let a request be repeated when there is room; one above `tokens_max` is not."""
        if self.state == "stopped":
            return
        inputs = len(shadow.ids)
        if sum(map(len, shadow.ids)) > tokens_max or not (self.reads_ids or shadow.texts):
            self.shadowed("skipped")
        elif self._waiting_inputs + inputs > self.canary.shadow_inputs_max:
            self.shadowed("dropped")
        else:
            self._waiting.append(shadow)
            self._waiting_inputs += inputs

    def begin(self) -> Shadow | None:
        """The next one to be repeated, if one more may be; `end` follows."""
        if not self._waiting or self._busy >= self.canary.shadows_at_once:
            return None
        shadow = self._waiting.popleft()
        self._waiting_inputs -= len(shadow.ids)
        self._busy += 1
        return shadow

    def end(self) -> None:
        """What was begun has ended, in whatever way."""
        self._busy -= 1

    def shadowed(self, end: ShadowEnd) -> None:
        """What became of a request that was to be repeated."""
        self.figures.shadows[end] += 1
        self._tally.shadows[self.canary.model, end] += 1

    def compared(self, shadow: Shadow, reply: EmbedReply) -> None:
        """The candidate has repeated a request."""
        self.shadowed("compared")
        self._ran("candidate", reply)
        cosines = self._cosines(shadow.reply.vectors, reply.vectors)
        for cosine in cosines:
            self.figures.distances.add(1 - cosine)
            self._tally.cosines.add(cosine, self.canary.model)
        self._compare(cosines, "an input that was repeated")

    # --- whether the vectors are the same ---------------------------------------------------

    def due(self, now: float) -> bool:
        """Whether the candidate has to show its vectors; asked again only after `CHECK_EVERY_S`."""
        if self.state == "stopped" or not self.canary.share or now < self._check_at:
            return False
        self._check_at = now + CHECK_EVERY_S
        return True

    def checked(self, stable: Vector, candidate: Vector) -> None:
        """What both made of the same texts."""
        self._compare(self._cosines(stable, candidate), "a text of the check")
        if self.state == "checking":
            self.state, self.reason = "running", ""

    def unchecked(self, why: str, now: float) -> None:
        """A check came to nothing: an answer is missing. What has been shown before holds."""
        self._check_at = now + CHECK_AGAIN_S
        if self.state == "checking":
            self.reason = f"The vectors could not be compared: {why}."

    def _cosines(self, stable: Vector, candidate: Vector) -> list[float]:
        """By input, from -1 to 1; none where the lengths differ."""
        if stable.shape != candidate.shape:
            return []
        found: list[float] = np.clip(np.sum(stable * candidate, axis=1), -1, 1).tolist()
        return found

    def _compare(self, cosines: Sequence[float], what: str) -> None:
        least = min(cosines, default=1.0)
        if self.canary.same_vectors and least < self.canary.cosine_min:
            self.stop(
                f"The cosine of {what} is {least:.5f}, below cosine_min {self.canary.cosine_min:g}."
            )

    # --- where it stands --------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """For good: until other settings come. What waits is not repeated any more."""
        if self.state != "stopped":
            self.state, self.reason = "stopped", reason
            self._waiting.clear()
            self._waiting_inputs = 0

    def report(self) -> CanaryReport:
        """For the other replicas and for operators."""
        return CanaryReport(self.key, self.state, self.reason, self.figures)

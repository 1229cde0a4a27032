"""The generic cell rate algorithm (ITU-T I.371) for one limit. Pure.

It is a token bucket kept as one number, the theoretical arrival time, and gives the exact time to
wait. A limit over a window T means burst + rate * T.
"""

from dataclasses import dataclass


EPSILON_S = 1e-9
"""Sums of floats: a wait below this is none."""


@dataclass(slots=True)
class Gcra:
    """What was used of one limit: one unit is refilled each `interval_s`.

    Attributes:
        tat: theoretical arrival time: when all of it is refilled, if nothing more is used.
        at: time of the latest charge.
        back_s: seconds given back so far; a mark counts without them.
    """

    interval_s: float
    tat: float
    at: float
    back_s: float = 0.0

    def free(self, burst: float, now: float) -> float:
        """Units left; below zero after a charge that nobody checked."""
        return burst - max(self.tat - now, 0.0) / self.interval_s

    def wait(self, burst: float, units: float, now: float) -> float:
        """Seconds until so many units can be charged; 0 for at once."""
        wait = max(self.tat, now) + (units - burst) * self.interval_s - now
        return wait if wait > EPSILON_S else 0.0

    def charge(self, units: float, now: float) -> float:
        """Use units, whatever is left; returns the mark at which this charge ends."""
        self.tat = max(self.tat, now) + units * self.interval_s
        self.at = now
        return self.tat + self.back_s

    def give_back(self, units: float, mark: float) -> None:
        """Take units off the charge that ends at `mark`.

        What of it had been refilled by the time of the latest charge is not given back: a late
        return must not let more than burst + rate * T through.
        """
        unfilled_s = max(mark - self.back_s - self.at, 0.0)
        back_s = min(units * self.interval_s, unfilled_s)
        self.tat -= back_s
        self.back_s += back_s

    def lower(self, burst: float, free: float, now: float) -> None:
        """See to it that no more than `free` units are left; earlier marks still hold."""
        self.tat = max(self.tat, now + (burst - free) * self.interval_s)

    def change(self, interval_s: float, now: float) -> None:
        """Go on at another rate with the same units used.

        Marks of before are worth nothing then: they are in seconds of the old rate.
        """
        if interval_s == self.interval_s:
            return
        debt_s = max(self.tat - now, 0.0)
        self.back_s += debt_s
        self.tat = now + debt_s / self.interval_s * interval_s
        self.at = now
        self.interval_s = interval_s

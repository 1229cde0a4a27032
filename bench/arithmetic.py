"""How much arithmetic a transformer's forward pass is, and how much a device can do.

The limit is not a maker's figure: it is a large product of matrices in the same numbers, on the same
device, in the same run.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self


SIDES = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices: large enough that nothing but arithmetic counts."""
REPEATS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What the operations of an encoder are counted from."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From a model's `config.json`. Raises KeyError when it is not an encoder of BERT's kind."""
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(found["num_hidden_layers"], found["hidden_size"], found["intermediate_size"])

    def operations(self, tokens: Sequence[int]) -> float:
        """Multiplications and additions of the layers over inputs of so many tokens, no padding.

        A token passes four matrices of hidden x hidden and two of hidden x intermediate; in
        attention it meets every token of its input twice, over the hidden size.
        """
        linear = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        return self.layers * sum(n * linear + 4 * n**2 * self.hidden for n in tokens)


def limit(device: str, precision: str) -> float:
    """Operations a second of a product of square matrices, the best of several."""
    import torch  # noqa: PLC0415  10 s

    side = SIDES[device]
    left = torch.ones((side, side), dtype=getattr(torch, precision), device=device)
    right = left.clone()
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        product = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
        del product
    return 2 * side**3 / best

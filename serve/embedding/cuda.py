"""The memory of the one GPU that a replica sees. Imports torch: `pool` asks it for GPU pools only."""

import torch

from serve.errors import ModelUnavailable


def device_name() -> str:
    """Of the card. Raises ModelUnavailable when there is none."""
    if not torch.cuda.is_available():
        raise ModelUnavailable("The pool wants a GPU, and torch finds none.")
    return torch.cuda.get_device_name()


def reserve(share: float) -> int:
    """Let this process take that share of the card's memory (0..1] at most; the bytes of it.

    Ray's fractions of a GPU are book-keeping: without this, replicas that share a card run each
    other out of memory. Raises ModelUnavailable when there is no card.
    """
    device_name()
    torch.cuda.set_per_process_memory_fraction(share)
    _, total = torch.cuda.mem_get_info()
    return int(share * total)


def held_bytes() -> int:
    """What this process's tensors take; the allocator's cache and CUDA's own context are not in it."""
    return int(torch.cuda.memory_allocated())


def card_bytes() -> tuple[int, int]:
    """Of the card: what is taken, by whomever, and all of it."""
    free, total = torch.cuda.mem_get_info()
    return total - free, total


def give_back() -> None:
    """Free what the allocator keeps for later, after a batch ran out of memory or a model left."""
    torch.cuda.empty_cache()

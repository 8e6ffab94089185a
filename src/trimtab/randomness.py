"""Random numbers drawn aside: whoever draws afterwards draws as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_aside(seed: int | None = None) -> Iterator[None]:
    """Torch's generators, of the CPU and of every GPU in use, go on afterwards as they were before.

    Args:
        seed: with which they begin in here; None: they go on from where they are.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        if seed is not None:
            begin(seed)
        yield


def begin(seed: int) -> None:
    """Seed the generators of the CPU and of every GPU in use.

    `torch.manual_seed` would also note the seed for GPUs that are not in use yet, where nobody takes it back.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)

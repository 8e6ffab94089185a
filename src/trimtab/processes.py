"""Calibration over several processes, as `accelerate launch` and torchrun start them.

    process 0   batches 0, 2, 4 ...  ->  sums  \\
                                                 the same sums in both  ->  the same masks
    process 1   batches 1, 3, 5 ...  ->  sums  /

Every process is given the same model and the same batches, and computes its share of them. Without a process group, or
with one of a single process, everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils._pytree import tree_map


def world() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def number(own: int) -> int:
    """The number among all batches, from 1, of a process's `own`-th batch, from 0."""
    rank, size = world()
    return own * size + rank + 1


def share(batches: Iterable[Any]) -> Iterator[Any]:
    """This process's part of the batches: of each group of as many as there are processes, the one at its rank.

    All processes go on in step. One that has none left in the last group gets None, and joins in what is summed with
    nothing of its own.

    Raises:
        ValueError: if the processes were given different batches.
    """
    rank, size = world()
    if size == 1:
        yield from batches
        return
    iterator = iter(batches)
    count = 0
    while True:
        group = list(islice(iterator, size))
        same_batches(group, f"{count + 1} to {count + size}")
        if not group:
            return
        count += len(group)
        yield group[rank] if rank < len(group) else None


def same_batches(group: list[Any], numbers: str) -> None:
    """Raise a ValueError with their numbers unless all processes were given the same batches."""
    same([_print(batch) for batch in group], f"calibration batches {numbers} differ between the {world()[1]} "
         "processes: give every process the same batches in the same order (it takes its share by itself; no sampler "
         "or `prepare` may divide them before)")  # fmt: skip


def same(value: object, problem: str) -> None:
    """Raise a ValueError with `problem` unless a plain value is the same in every process."""
    if any(other != value for other in everywhere(value)):
        raise ValueError(problem)


def everywhere(value: object) -> list[Any]:
    """A plain value of each process, in the order of their ranks."""
    size = world()[1]
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def shared(count: int) -> range:
    """Which of so many pieces of work, that need each other's results only at the end, are this process's."""
    rank, size = world()
    return range(rank, count, size)


def in_turn(mine: list[Any], count: int) -> list[Any]:
    """What each process found for its pieces (`shared`), in the order of all pieces. Tensors come through the main
    memory, and are afterwards on this process's GPU if they were on one."""
    size = world()[1]
    if size == 1:
        return mine
    found = everywhere(tree_map(_sent, mine))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return tree_map(lambda x: x.value.to(device) if isinstance(x, _Sent) else x,
                    [found[number % size][number // size] for number in range(count)])  # fmt: skip


class _Sent:
    """A tensor of a GPU, on its way."""

    def __init__(self, value: Tensor):
        self.value = value


def _sent(value: Any) -> Any:
    return _Sent(value.cpu()) if isinstance(value, Tensor) and value.is_cuda else value


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def in_order(tensor: Tensor) -> list[Tensor]:
    """A tensor of each process, in the order of their ranks, and so of the batches they come from."""
    size = world()[1]
    if size == 1:
        return [tensor]
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(found, tensor)
    return found


def from_first(tensor: Tensor) -> Tensor:
    """The tensor of process 0, in every process."""
    if world()[1] == 1:
        return tensor
    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
    if dist.get_backend() == "nccl":  # which sends nothing that lies on the CPU, as masks do
        sent = sent.cuda()
    dist.broadcast(sent, 0)
    return sent.to(tensor.device, tensor.dtype)


def divided_like(whole: Tensor, other: Tensor) -> Tensor:
    """A tensor that is whole in every process, divided among them as another (FSDP's parameters); itself otherwise."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)  # nothing is sent


def weights_print(tensors: Iterable[Tensor]) -> list[str]:
    """What tells a model's weights from another's."""
    return [_sum(t) for t in tensors] if world()[1] > 1 else []


def _print(batch: Any) -> list[str]:
    """What tells a batch from another, without sending it: names, shapes and sums of its tensors."""
    if not isinstance(batch, Mapping):
        return [str(type(batch))]
    return [f"{k} {tuple(v.shape)} {_sum(v)}" for k, v in sorted(batch.items()) if isinstance(v, Tensor)]


def _sum(tensor: Tensor) -> str:
    return f"{tensor.detach().sum(dtype=torch.float64).item():.6e}"

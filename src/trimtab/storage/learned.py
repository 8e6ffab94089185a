"""The learned part of a model: what training changes, as tensors by name, and the backbone to which it belongs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase

from trimtab.anatomy.structure import plain_modules


def learned_part(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and the buffers that change with them, each tied one once, under their names in the model:
    the tensors themselves, no copies.

    Buffers are those of modules that hold a trainable parameter, and the running statistics of norms that have no
    parameters at all: nothing freezes these while anything is trained. Buffers that a module does not store
    (`persistent=False`) are left out.
    """
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    trains = any(p.requires_grad for p in model.parameters())
    for path, module in model.named_modules():
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        trained: list[tuple[str, Tensor]] = [(n, p) for n, p in own if p.requires_grad]
        moves = bool(trained) or (trains and not own and isinstance(module, _NormBase))
        for name, tensor in trained + (_stored_buffers(module) if moves else []):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                out[f"{path}.{name}".lstrip(".")] = tensor
    return out


def _stored_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own buffers, without those that its state leaves out."""
    hidden = module._non_persistent_buffers_set
    return [(n, b) for n, b in module._buffers.items() if b is not None and n not in hidden]


def fingerprint(model: nn.Module) -> str:
    """A hash of every value of a plain model, to tell whether learned weights belong to it.

    It goes over parameters and stored buffers under their plain paths, with their shapes, types and bytes, so that
    LoRA's wrapping and modules that methods added change nothing. Of tensors without values (fake ones and those on the
    meta device) only shapes and types count. One tensor at a time is copied from a GPU.
    """
    digest = hashlib.sha256()  # twice as fast as blake2b on processors that have instructions for it
    first: dict[int, str] = {}
    for name, tensor in sorted(_plain_tensors(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if (tied := first.setdefault(id(tensor), name)) != name:
            digest.update(f"= {tied}\n".encode())
        elif not isinstance(tensor, FakeTensor) and not tensor.is_meta:
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            if whole.numel():
                digest.update(whole.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def precision(model: nn.Module) -> dict[str, int]:
    """Type -> number of the plain model's parameters that are stored in it (`{"float32": 1200}`), each tied one once.

    It tells a base in another precision from one with other weights.
    """
    tensors = {id(p): p for _, module in plain_modules(model) for p in module._parameters.values() if p is not None}
    found: Counter[str] = Counter()
    for tensor in tensors.values():
        found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(sorted(found.items()))


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers of the plain model."""
    for path, module in plain_modules(model):
        for name, tensor in [*module._parameters.items(), *_stored_buffers(module)]:
            if tensor is not None:
                yield f"{path}.{name}".lstrip("."), tensor


# --- whether tensors are as they were ---------------------------------------------------------------------------------


def named_tensors(model: nn.Module, with_task: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Every parameter and stored buffer, each tied one once: name -> tensor, and whether it is the plain model's.

    Names begin with `kept.`, those around the model with `task.`; the plain model's are plain paths.
    """
    out: dict[str, tuple[Tensor, bool]] = {}
    seen: set[int] = set()

    def add(name: str, tensor: Tensor, plain: bool) -> None:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            out[name] = (tensor, plain)

    for path, tensor in _plain_tensors(model):
        add(f"kept.{path}", tensor, True)
    for path, parameter in model.named_parameters():
        add(f"kept.{path}", parameter, False)
    if with_task is not model:
        seen |= {id(b) for b in model.buffers()}
        for path, tensor in _plain_tensors(with_task):
            add(f"task.{path}", tensor, True)
    return out


@dataclass(frozen=True)
class Trace:
    """What is remembered of a tensor, to see whether it was changed.

    Attributes:
        sums: type -> the sum of the tensor's bits, weighted by place, in that type, for the types to which a model may
            be cast; empty if they cannot be read (fake, quantised or sharded tensors).
        trained: whether it was to be trained.
    """

    sums: dict[torch.dtype, int]
    trained: bool

    def left(self, tensor: Tensor) -> bool:
        """Whether a tensor has other values now. In a type that was not foreseen: whether it was trained before."""
        now = _sum_of_bits(tensor)
        if not self.sums or now is None:
            return False
        return now != self.sums[tensor.dtype] if tensor.dtype in self.sums else self.trained


def trace(tensor: Tensor, before: Trace | None = None) -> Trace:
    """What to remember of a tensor.

    Args:
        tensor: any.
        before: what was remembered of it; if it has the same type and values still, nothing is cast again.
    """
    own, kind = _sum_of_bits(tensor), tensor.dtype
    if own is None:
        return Trace({}, tensor.requires_grad)
    foreseen = (torch.bfloat16, torch.float16) if kind == torch.float32 else ()
    if before is not None and before.sums.keys() == {kind, *foreseen} and before.sums[kind] == own:
        return Trace(before.sums, tensor.requires_grad)
    cast = {other: _sum_of_bits(tensor.detach().to(other)) for other in foreseen}
    return Trace({kind: own} | {k: n for k, n in cast.items() if n is not None}, tensor.requires_grad)


@torch.no_grad()
def _sum_of_bits(tensor: Tensor) -> int | None:
    """The bits of all elements in sum, read as integers of eight bytes and weighted by where they stand, so that
    numbers that changed places are seen (modulo 2^64); None of tensors that have none to read."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.is_quantized:
        return None
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if rest := -bits.numel() % 8:
        bits = nn.functional.pad(bits, (0, rest))
    elif bits.storage_offset() % 8:
        bits = bits.clone()
    words, total = bits.view(torch.int64), 0
    weights = 2 * torch.arange(min(len(words), _PIECE), device=bits.device) + 1
    for piece in words.split(_PIECE):  # stays in a core's cache
        total = (total * _STEP + int((piece * weights[: len(piece)]).sum())) % 2**64
    return total


_PIECE, _STEP = 1 << 15, 0x9E3779B97F4A7C15  # numbers at a time; an odd factor with bits all over

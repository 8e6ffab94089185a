"""The learned part of a model: what training changes, as tensors by name, and the backbone to which it belongs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

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

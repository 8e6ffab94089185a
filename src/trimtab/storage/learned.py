"""The learned part of a model: what training changes, as tensors by name, and the backbone to which it belongs."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def learned_part(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters, and the buffers of the modules that hold them, each tied one once."""
    out, seen = {}, set()
    for path, module in model.named_modules():
        own = list(module.named_parameters(recurse=False))
        trained = [(n, p) for n, p in own if p.requires_grad]
        kept = set(module.state_dict(keep_vars=True)) if trained else ()
        buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if n in kept]
        for name, tensor in trained + buffers:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                out[f"{path}.{name}".lstrip(".")] = tensor.detach().cpu().contiguous()
    return out


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's tensor names, shapes and a sample of their values, to tell whether weights belong to it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)][:512].float().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def copy_learned(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy stored tensors into a model; ValueError unless they are exactly its learned part, shape by shape."""
    expected = learned_part(model)
    wrong = [f"'{k}' {tuple(expected[k].shape)}, found {tuple(v.shape)}"
             for k, v in tensors.items() if k in expected and v.shape != expected[k].shape]  # fmt: skip
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if wrong or missing or extra:
        problem = (
            f"expected {wrong[0]}"
            if wrong
            else f"'{missing[0]}' is missing"
            if missing
            else f"'{extra[0]}' is not in it"
        )
        raise ValueError(f"{where}: the weights do not fit the model: {problem} "
                         f"({len(wrong)} of another shape, {len(missing)} missing, {len(extra)} extra)")  # fmt: skip
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

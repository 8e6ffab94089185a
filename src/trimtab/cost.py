"""What a model with its methods costs, before and after paying it.

params, trainable_params       numbers
macs, dense_macs               multiply-adds of one forward pass of one sample, with and without the methods; one
                               multiply-add is 1 MAC (torch counts 2 FLOPs); matrix products, convolutions, attention
saved_activation_bytes         what autograd keeps for backward in one training batch, each storage once, without
                               parameters and buffers
checkpoint_bytes               the learned part as safetensors
training_peak_bytes            estimated before: weights, gradients, AdamW's two moments and whatever else lives at the
                               worst moment of one training step, from the sizes of tensors; no kernel's workspace
peak_memory_bytes              of one training step: CUDA's peak, or without a GPU the growth of the resident set
latency_ms                     one sample, one forward pass: median, and the 10th and 90th percentile
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trimtab.anatomy import Anatomy
from trimtab.recipe import Recipe
from trimtab.tasks.base import TaskModel

if TYPE_CHECKING:
    from trimtab.methods.base import Session
    from trimtab.run import Assembly


def count_macs(function: Callable[[], Any]) -> int:
    """Multiply-adds of everything that a call computes (half of what `torch.utils.flop_counter` calls FLOPs)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The counter knows the matrix products inside the plain attention kernel, but not the CPU's fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def saved_bytes(function: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `function()`, each storage once, without the model's own."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor  # kept alive by the graph, so that no storage's address is used twice

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    del result
    return sum(kept.values())


class _Alive(TorchDispatchMode):
    """Bytes of the storages that live while a call runs, and the most at one time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


def training_peak(function: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that one training step needs at its worst moment, AdamW's two moments included.

    Everything is counted by the sizes of its tensors: weights, what the forward pass makes and keeps, gradients. What
    kernels take besides, an allocator's rounding and fragments, and the optimiser's own temporaries are not.

    Args:
        function: forward pass, returns the loss; on fake tensors nothing is computed.
        model: in the mode in which it trains; its gradients are gone afterwards.
    """
    model.zero_grad(set_to_none=True)
    with torch.enable_grad(), _Alive(model) as alive:
        loss = function()
        if loss.requires_grad:
            loss.backward()
    model.zero_grad(set_to_none=True)
    moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return alive.peak + moments


_SAFETENSORS = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def safetensors_size(tensors: dict[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors, without writing it."""
    header, offset = {}, 0
    order = list(_SAFETENSORS)
    # The library writes types from last to first of its own list, and within a type by name.
    for name, t in sorted(tensors.items(), key=lambda item: (-order.index(item[1].dtype), item[0])):
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": _SAFETENSORS[t.dtype], "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + length + -length % 8 + offset


def latency(function: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Milliseconds of a call: median, 10th and 90th percentile of `repeats` after `warmup`."""
    times = []
    with torch.inference_mode():
        for i in range(warmup + repeats):
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if i >= warmup:
                times.append((time.perf_counter() - start) * 1000)
    times.sort()
    return {
        "median": round(statistics.median(times), 3),
        "p10": round(times[len(times) // 10], 3),
        "p90": round(times[-1 - len(times) // 10], 3),
    }


def peak_memory(function: Callable[[], Any]) -> int | None:
    """Peak bytes while a call runs: allocated on the GPU, else the growth of the resident set (Linux), else None."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give freed pages back, or the growth hides in them
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(parts: Assembly, dense_macs: int, batch_size: int, weights: Path) -> dict[str, Any]:
    """All costs of an assembled, attached model; `weights` is the file of its learned part."""
    model = parts.model
    device = next(model.parameters()).device
    one, batch = ({k: v.to(device) for k, v in model.example(n).items()} for n in (1, batch_size))
    model.train()

    def step() -> None:
        loss = model(**batch)["loss"]
        if loss.requires_grad:
            loss.backward()
        model.zero_grad(set_to_none=True)

    costs = _counts(model, one, batch)
    costs |= {
        "dense_macs": dense_macs,
        "checkpoint_bytes": weights.stat().st_size,
        "peak_memory_bytes": peak_memory(step),
    }
    model.eval()
    costs["latency_ms"] = latency(lambda: model(**one))
    return costs


def _counts(model: TaskModel, one: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Any]:
    model.eval()
    macs = count_macs(lambda: model(**one))
    model.train()
    parameters = list(model.parameters())
    return {
        "params": sum(p.numel() for p in parameters),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "macs": macs,
        "saved_activation_bytes": saved_bytes(lambda: model(**batch)["loss"], model),
        "batch_size": len(next(iter(batch.values()))),
    }


def dense(recipe: Recipe) -> int:
    """Multiply-adds of a recipe's model before any method changes it."""
    from trimtab.run import assemble

    bare = replace(recipe, methods=(), backbone=replace(recipe.backbone, pretrained=False, start_from=None))
    key = json.dumps([asdict(bare.backbone), bare.task, bare.data])
    if key not in _DENSE:  # every variant of a recipe asks for the same figure
        parts = assemble(bare)
        parts.model.eval()
        one = parts.model.example(1)
        _DENSE[key] = count_macs(lambda: parts.model(**one))
    return _DENSE[key]


_DENSE: dict[str, int] = {}


def estimate(recipe: Recipe) -> dict[str, Any]:
    """The costs that need no data and no weights: random weights, and fake tensors where the model allows them.

    Plans and masks that only data could give are assumed: DAS skips the last k blocks, or as many of the last as its
    budget takes; a pruner keeps its share.

    Returns:
        `params`, `trainable_params`, `macs`, `dense_macs`, `saved_activation_bytes` and `training_peak_bytes` (for the
        recipe's batch size, which is in `batch_size`), `checkpoint_bytes`, and `nonzero_params`.
    """
    blind = replace(recipe, backbone=replace(recipe.backbone, pretrained=False, start_from=None))
    try:
        with sizes_only():
            return _estimate(blind)
    except RuntimeError:
        # A model that looks at values while it runs, or a budget of latency, cannot work on fake tensors: count on real
        # random weights. An error of another cause comes again there.
        return _estimate(blind)


@contextmanager
def sizes_only() -> Iterator[None]:
    """Tensors have shapes and types, but no memory and no values: models of any size are built and run at once."""
    import logging

    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers.initialization import no_init_weights

    # Modules stay where they are made; PEFT moves its own all the same, which fake tensors refuse.
    stay = mock.patch.object(nn.Module, "to", lambda self, *_, **__: self)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # an operation that fails is raised and need not be told
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights(), stay:
            yield
    finally:
        log.setLevel(level)


class _Blind:
    """The part of a `Session` that needs no data."""

    folder = None

    def __init__(self, model: TaskModel, anatomy: Anatomy, seed: int):
        self.model, self.anatomy, self.seed = model, anatomy, seed

    @property
    def subject(self) -> nn.Module:
        return self.model.backbone.model

    def locate(self, model: Any) -> nn.Module:
        return model.backbone.model


def _estimate(recipe: Recipe) -> dict[str, Any]:
    from trimtab.run import assemble

    dense_macs = dense(recipe)
    parts = assemble(recipe)
    parts.model.backbone.requires_grad_(False)
    anatomy = parts.model.backbone.anatomy
    for method in parts.methods:
        method.assume(parts.subject, anatomy, cast("Session", _Blind(parts.model, anatomy, recipe.seed)))
        anatomy = method.attach(parts.subject, anatomy)
    parts.settle()
    batch = parts.model.example(recipe.training.batch_size)
    costs = _counts(parts.model, parts.model.example(1), batch)
    costs["training_peak_bytes"] = training_peak(lambda: parts.model(**batch)["loss"], parts.model)
    zeros = sum(m.state.get("prunable", 0) - m.state.get("kept", 0) for m in parts.methods)
    return {
        **costs,
        "dense_macs": dense_macs,
        "checkpoint_bytes": safetensors_size(parts.detach_learned()),
        "nonzero_params": costs["params"] - zeros,
    }

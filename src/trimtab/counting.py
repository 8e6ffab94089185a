"""What a call costs, counted or measured: any function of any model; nothing here knows methods, tasks or recipes.

macs                  multiply-adds (one is 1 MAC; torch counts 2 FLOPs): matrix products, convolutions, attention;
                      of a whole call, and of single modules within it
saved bytes           what autograd keeps for backward, each storage once, without parameters and buffers
training peak         weights, gradients, AdamW's two moments and whatever else lives at the worst moment of one
                      training step, from the sizes of tensors; no kernel's workspace
peak memory           CUDA's peak, or without a GPU the growth of the resident set
latency               median, 10th and 90th percentile of repeated calls
"""

from __future__ import annotations

import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from trimtab.memory import give_back
from trimtab.storage.types import NAMES, shape_of


def count_macs(function: Callable[[], Any]) -> int:
    """Multiply-adds of everything that a call computes (half of what `torch.utils.flop_counter` calls FLOPs)."""
    return count_inside((), function)[0]


def count_inside(modules: Sequence[nn.Module], function: Callable[[], Any]) -> tuple[int, list[int]]:
    """Multiply-adds of a call, and those inside each of some modules that it runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The counter knows the matrix products inside plain kernels, but not the fused ones of attention and of torch's
    # encoder layers.
    counter: Any = FlopCounterMode(display=False, custom_mapping=_more_products())
    counter.mod_tracker = _NoModules()
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            inside = _inside(modules, counter.get_total_flops, function)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2, [int(flops) // 2 for flops in inside]


def _more_products() -> dict[Any, Callable[..., int]]:
    """FLOPs of products that torch's counter does not know, from the shapes of what they are given."""

    def grouped(a: Sequence[int], b: Sequence[int], *rest: Any, **more: Any) -> int:
        """Experts: (rows, in) by (experts, in, out), each row by one, and the other ways to divide a product."""
        return 2 * (a[0] if len(a) == len(b) == 3 else 1) * a[-2] * a[-1] * b[-1]

    def vector(a: Sequence[int], *rest: Any, **more: Any) -> int:
        return 2 * a[0] * a[1]

    def added(bias: Sequence[int], a: Sequence[int], *rest: Any, **more: Any) -> int:
        return vector(a)

    def recurrent(x: Sequence[int], w: Sequence[int], u: Sequence[int], *rest: Any, **more: Any) -> int:
        """One direction of an LSTM's layer: inputs (steps, batch, in), weights (4 out, in) and (4 out, out)."""
        return 2 * math.prod(x[:-1]) * (math.prod(w) + math.prod(u))

    def bilinear(x: Sequence[int], w: Sequence[int], *rest: Any, **more: Any) -> int:
        """`nn.Bilinear`: inputs (rows, in) and (rows, other in), weights (out, in, other in)."""
        return 2 * x[0] * math.prod(w)

    aten = torch.ops.aten
    return {aten._grouped_mm: grouped, aten.mv: vector, aten.addmv: added, aten.mkldnn_rnn_layer: recurrent,
            aten._trilinear: bilinear}  # fmt: skip


class _NoModules:
    """In the place of the counter's tracker of modules, whose sums nobody asks for here. It fails on a module that is
    called with a view of a parameter without gradients (BLIP-2's query tokens)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


def time_inside(modules: Sequence[nn.Module], function: Callable[[], Any], repeats: int = 15
                ) -> tuple[float, list[float]]:  # fmt: skip
    """Milliseconds of a call, and those inside each of some modules: medians, after 3 calls that do not count."""

    def now() -> float:
        _synchronize()
        return time.perf_counter() * 1000

    whole, parts = [], []
    with torch.no_grad():
        for repeat in range(repeats + 3):
            start = now()
            inside = _inside(modules, now, function)
            if repeat >= 3:
                whole.append(now() - start)
                parts.append(inside)
    return statistics.median(whole), [statistics.median(column) for column in zip(*parts, strict=True)]


def _inside(modules: Sequence[nn.Module], clock: Callable[[], float], function: Callable[[], Any]) -> list[float]:
    """How far a clock moves inside each module during one call."""
    moved, started = [0.0] * len(modules), [0.0] * len(modules)
    handles = []
    for i, module in enumerate(modules):

        def before(*_: Any, i: int = i) -> None:
            started[i] = clock()

        def after(*_: Any, i: int = i) -> None:
            moved[i] += clock() - started[i]

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        function()
    finally:
        for handle in handles:
            handle.remove()
    return moved


def saved_bytes(function: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `function()`, each storage once, without the model's own.

    What belongs to a graph that is gone when the function returns does not count: nothing is kept of it.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output as it is would keep its own graph, for ever
        kept.add(saved)
        return saved

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = function()
        storages = {s._cdata: s.nbytes() for s in (saved.tensor.untyped_storage() for saved in kept)}
    del result
    return sum(size for key, size in storages.items() if key not in own)


class _Saved:
    """A tensor in a graph, which alone keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


ASKS_DEVICE = torch.ops.prim.device.default
"""More than half of what reaches a dispatch mode over fake tensors; it makes no tensor."""


def device_of(tensor: Tensor) -> torch.device:
    """What `ASKS_DEVICE` gives, without a way through all modes; only tensors without memory of their own ask it."""
    if not isinstance(tensor, FakeTensor):
        return tensor.device
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


class Alive(TorchDispatchMode):
    """Bytes of the storages that live while a call runs, and the most at one time; those of `known` from the start."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in known:
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
        if function is ASKS_DEVICE:
            return device_of(*args)
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@dataclass(frozen=True)
class TrainingStep:
    """What one training step keeps and needs.

    Attributes:
        saved: bytes that autograd keeps for the backward pass, see `saved_bytes`.
        peak: bytes at the worst moment, see `training_peak`.
        idle: names of parameters that are called trained but get no gradient.
    """

    saved: int
    peak: int
    idle: tuple[str, ...]


def training_step(function: Callable[[], Tensor], model: nn.Module) -> TrainingStep:
    """One training step, looked at from all sides.

    Args:
        function: forward pass, returns the loss; on fake tensors nothing is computed.
        model: in the mode in which it trains; its gradients are gone afterwards.
    """
    model.zero_grad(set_to_none=True)
    found: list[Tensor] = []
    with torch.enable_grad(), Alive([*model.parameters(), *model.buffers()]) as alive:
        saved = saved_bytes(lambda: _kept(found, function()), model)
        loss = found.pop()
        if loss.requires_grad:
            loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = tuple(n for n, p in trained.items() if p.grad is None)
    model.zero_grad(set_to_none=True)
    moments = 2 * sum(p.nbytes for p in trained.values())
    return TrainingStep(saved, alive.peak + moments, idle)


def _kept(found: list[Tensor], loss: Tensor) -> Tensor:
    found.append(loss)
    return loss


def training_peak(function: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that one training step needs at its worst moment, AdamW's two moments included.

    Everything is counted by the sizes of its tensors: weights, what the forward pass makes and keeps, gradients. What
    kernels take besides, an allocator's rounding and fragments, and the optimiser's own temporaries are not.

    Args:
        function: forward pass, returns the loss; on fake tensors nothing is computed.
        model: in the mode in which it trains; its gradients are gone afterwards.
    """
    return training_step(function, model).peak


def safetensors_size(tensors: dict[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors, without writing it.

    Raises:
        ValueError: if such a file cannot hold the type of one of them.
    """
    header, offset = {}, 0
    for name, t in tensors.items():
        if t.dtype not in NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
            raise ValueError(f"{name}: a safetensors file holds no {t.dtype}: cast it to one of {known}")
    order = list(NAMES)
    for name, t in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        end = offset + t.numel() * t.element_size()
        header[name] = {"dtype": NAMES[t.dtype], "shape": shape_of(t), "data_offsets": [offset, end]}
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
        give_back()  # or the growth hides in what was freed
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
        before = _status("VmRSS")
        function()
        return _status("VmHWM") - before
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""Real speed from 2:4 zeros: the layers whose semi-structured kernels are measured to be faster here, and only those.

    layers(model)    every linear layer: is its weight 2:4, may torch's kernels take it
    -> measure       each (shape, dtype, bias) once: dense against sparse seconds for a number of tokens
    -> convert       where sparse is faster and gives the same result, the weight becomes a `SparseSemiStructuredTensor`

The kernels are core torch's (`torch.sparse.to_sparse_semi_structured`: cuSPARSELt or CUTLASS) and exist for NVIDIA GPUs
since Ampere alone. Nothing else that a pruner leaves runs faster in torch: other zeros are multiplied like any number.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_REPEATS, _WARM = 20, 5
_HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Layer:
    """What was found out about a linear layer.

    Attributes:
        path: of the module.
        shape: of its weight, (out, in).
        dtype: of its weight.
        zeros: share of zeros in its weight.
        is_2_4: whether at most 2 of every 4 inputs that follow each other are non-zero.
        dense_ms: median milliseconds of the layer with its dense weight; None if it was not measured.
        sparse_ms: the same with its weight as 2 of 4.
        converted: whether its weight was replaced.
        why: why it was not.
    """

    path: str
    shape: tuple[int, int]
    dtype: str
    zeros: float
    is_2_4: bool
    dense_ms: float | None = None
    sparse_ms: float | None = None
    converted: bool = False
    why: str = ""

    @property
    def ratio(self) -> float | None:
        """Sparse over dense time; below 1 is faster."""
        return self.sparse_ms / self.dense_ms if self.dense_ms and self.sparse_ms else None


@dataclass
class SpeedReport:
    """What `speed_up` did with every linear layer of a model.

    Attributes:
        device: where it was measured.
        tokens: how many rows the measured inputs had.
        layers: in the order of the model's modules.
    """

    device: str
    tokens: int
    layers: list[Layer] = field(default_factory=list)

    @property
    def converted(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.converted]

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary a layer, for tables and JSON."""
        return [{**asdict(layer), "shape": list(layer.shape), "ratio": layer.ratio} for layer in self.layers]

    def __str__(self) -> str:
        count = f"{len(self.converted)} of {len(self.layers)} linear layers converted"
        head = f"{count} on {self.device}, {self.tokens} tokens"
        lines = []
        for x in self.layers:
            timed = f"{x.dense_ms:.3f} -> {x.sparse_ms:.3f} ms ({x.ratio:.2f}x)" if x.ratio else ""
            lines.append(f"{x.path} {x.shape} {x.dtype}: {'converted' if x.converted else x.why} {timed}".rstrip())
        return "\n".join([head, *lines])


@torch.no_grad()
def speed_up(model: nn.Module, tokens: int, convert: bool = True, margin: float = 0.05) -> SpeedReport:
    """Give the 2:4 linear layers of a model torch's semi-structured kernels, where they are measured to be faster.

    For inference: a converted weight has no gradient and cannot be saved; save the model before. Move it to its device,
    and to the type it shall compute in, before too.

    Args:
        model: changed in place, if anything is faster.
        tokens: rows of the inputs that it will see, batch times length; the ratio depends on it.
        convert: False only reports.
        margin: how much faster, as a share of the dense time, a layer must be to be converted.

    Returns:
        A report of every `nn.Linear`: converted, or why not.

    Raises:
        ValueError: if the model has no linear layer, or `tokens` is below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, found {tokens}")
    found = list(_linears(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to convert")
    weight = found[0][1].weight
    report = SpeedReport(_device_name(weight.device), tokens)
    measured: dict[tuple, tuple[float, float] | str] = {}
    for path, linear in found:
        layer = _examine(path, linear)
        report.layers.append(layer)
        layer.why = _obstacle(layer, linear)
        if layer.why:
            continue
        key = (layer.shape, linear.weight.dtype, linear.weight.device, linear.bias is not None)
        if key not in measured:
            measured[key] = _measure(linear, tokens)
        result = measured[key]
        if isinstance(result, str):
            layer.why = result
            continue
        layer.dense_ms, layer.sparse_ms = (1000 * seconds for seconds in result)
        if layer.sparse_ms > (1 - margin) * layer.dense_ms:
            layer.why = "slower" if layer.sparse_ms >= layer.dense_ms else f"less than {100 * margin:.0f} % faster"
        elif convert:
            layer.why = _replace(linear, tokens)
            layer.converted = not layer.why
        else:
            layer.why = "faster; not asked to convert"
    return report


def is_2_4(weight: Tensor) -> bool:
    """Whether at most 2 of every 4 inputs that follow each other are non-zero in each row of a weight (out, in)."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(len(weight), -1, 4).sum(dim=-1) <= 2).all())


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that are called as such; torch's attention hands its output projection's weight on instead."""
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in inside:
            yield path, module


def _examine(path: str, linear: nn.Linear) -> Layer:
    weight = linear.weight
    zeros = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Layer(path, (weight.shape[0], weight.shape[1]), dtype, round(zeros, 4), is_2_4(weight))


def _obstacle(layer: Layer, linear: nn.Linear) -> str:
    """Why a layer cannot be converted; empty if it can."""
    if not layer.is_2_4:
        return "not 2:4"
    reason = _device_obstacle(linear.weight.device)
    if reason:
        return reason
    if linear.weight.dtype not in _HALVES:
        return f"dtype {layer.dtype}: the kernels that pay take float16 and bfloat16"
    return ""


def _device_obstacle(device: torch.device) -> str:
    """Why a device has no semi-structured kernels; empty if it has."""
    if device.type != "cuda":
        return (
            f"no NVIDIA GPU (the weight is on {device.type!r}): torch has semi-structured kernels for no other device"
        )
    if torch.version.hip:
        return "an AMD GPU: torch has semi-structured kernels for NVIDIA's"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"GPU of compute capability {major}.{minor}: 8.0 (Ampere) or newer is needed"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _compress(weight: Tensor) -> Tensor:
    """A weight as torch's 2 of 4; RuntimeError if its shape or type does not suit the kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the interface is a prototype
        return torch.sparse.to_sparse_semi_structured(weight.contiguous())


def _measure(linear: nn.Linear, tokens: int) -> tuple[float, float] | str:
    """Median seconds of a layer with its dense weight and as 2 of 4; or why the kernels do not take it."""
    weight = linear.weight.detach()
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        packed = _compress(weight)
        F.linear(x, packed, linear.bias)
    except (RuntimeError, NotImplementedError) as error:
        return f"shape or type not supported: {' '.join(str(error).split())[:120]}"
    return _seconds(lambda: F.linear(x, weight, linear.bias), lambda: F.linear(x, packed, linear.bias), weight.device)


def _replace(linear: nn.Linear, tokens: int) -> str:
    """Convert a layer unless its results would change; why not, or empty."""
    weight = linear.weight.detach()
    x = torch.randn(min(tokens, 64), weight.shape[1], dtype=weight.dtype, device=weight.device)
    packed = _compress(weight)
    dense, sparse = (F.linear(x, w, linear.bias).float() for w in (weight, packed))
    error = float((dense - sparse).abs().max() / dense.abs().max().clamp_min(1e-12))
    if not error <= 0.02:  # halves are rounded to 3 digits, in another order of summation
        return f"results differ by {error:.1e} of the largest"
    linear.weight = nn.Parameter(packed, requires_grad=False)
    return ""


def _seconds(dense: Callable[[], Tensor], sparse: Callable[[], Tensor], device: torch.device) -> tuple[float, float]:
    """Median seconds of two works that take turns, so that what disturbs one disturbs the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(_WARM + _REPEATS):
        for work, found in zip((dense, sparse), times, strict=True):
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            if i >= _WARM:
                found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

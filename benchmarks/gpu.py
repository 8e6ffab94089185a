"""What the levers cost on a GPU: memory and time of training steps, latency of skipping, calibration, 2:4 kernels.

    python benchmarks/gpu.py > gpu.json           one GPU of 80 GB, at most 8 minutes; the table goes to standard error
    python benchmarks/gpu.py --tiny > /dev/null   tiny models, on whatever is there, to see that all of it runs

A step is forward, backward and AdamW on one batch that stays on the card, in bfloat16 (autocast; the weights of frozen
backbones are bfloat16, what is trained is in single precision). Memory is the allocator's peak over whole steps,
weights, gradients and moments included (without a GPU: counted from the sizes of tensors). The loss is mean squares of
what a model hands on, or its own. Of VSE-infinity a step has 48 pairs and not the published 112, which do not fit; the
published figures (G of 1000 MiB, summed over the authors' GPUs, in single or mixed precision) stand beside as
shares of full tuning. Each measurement is caught: one that fails is a row with its reason, and one for which no time is
left is a row that says so. `--out` writes what is known after each, so that a run that is ended loses nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from gpu_models import SETTINGS, batch_of, made, settings_of
from torch import Tensor, nn

import trimtab
from trimtab.backbones.examples import tensors
from trimtab.counting import latency, peak_memory, training_peak
from trimtab.methods.tune.listener import Seen
from trimtab.speed import speed_up

# Name of a row -> method, its settings, whether blocks are checkpointed.
WAYS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "full": ("full", {}, False),
    "lora": ("lora", {}, False),
    "lora, checkpointing": ("lora", {}, True),
    "adapter": ("adapter", {}, False),
    "lst": ("lst", {}, False),
    "unipt": ("unipt", {}, False),
    "unipt, keep_scores true": ("unipt", {"keep_scores": True}, False),
    "unipt, keep_scores false": ("unipt", {"keep_scores": False}, False),
    "unipt, keep_maps bf16": ("unipt", {"keep_maps": "bf16"}, False),
    "unipt, keep_maps fp16": ("unipt", {"keep_maps": "fp16"}, False),
}
CACHED = "unipt, cached"
COMPILED = ("lora", "unipt", "full")  # these are also timed as torch.compile makes them


class OutOfTimeError(Exception):
    """A measurement took longer than it may."""


@dataclass
class Bench:
    """Where the measurements run, how long they may, and what they have found."""

    device: torch.device
    tiny: bool
    budget: float
    steps: int
    out: Path | None = None
    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.started)

    def row(self, about: dict[str, Any], work: Callable[[], dict[str, Any]], most: float = 60) -> dict[str, Any]:
        """Keep what a measurement finds, or why it finds nothing."""
        row = dict(about)
        try:
            if self.left < 1:
                raise OutOfTimeError(f"not measured: the {self.budget:.0f} s are over")
            with alarm(min(most, self.left)):
                row |= work()
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row)
        if self.out is not None:
            self.out.write_text(json.dumps(self.found(), indent=1) + "\n")
        return row

    def found(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"device": name, "torch": torch.__version__, "transformers": hf.__version__, "tiny": self.tiny,
                "seconds": round(time.monotonic() - self.started, 1), "rows": self.rows}  # fmt: skip


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after so many seconds (between two steps of Python, not inside a kernel)."""

    def ring(*_: Any) -> None:
        raise OutOfTimeError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- training steps ---------------------------------------------------------------------------------------------------


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or mean squares of all that it hands on."""
    own = output.get("loss") if hasattr(output, "get") else None
    if isinstance(own, Tensor):
        return own.float()
    found = [t.float() for t in tensors(output) if t.is_floating_point() and t.requires_grad]
    return torch.stack([torch.where(t.isfinite(), t, 0).square().mean() for t in found]).sum()


def tuned(bench: Bench, name: str, way: str) -> Any:
    """The handle of the model with a method, in training mode."""
    method, settings, checkpointing = WAYS[way]
    model = made(name, bench.tiny, bench.device, half=method != "full")
    fit = trimtab.tune(model, method, **settings_of(name, method, bench.tiny), **settings)
    if checkpointing:
        parts = [m for m in model.modules() if isinstance(m, hf.PreTrainedModel) and m.supports_gradient_checkpointing]
        for part in parts:
            part.gradient_checkpointing_enable()
        if not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise ValueError("no part of this model can be checkpointed by transformers")
    model.train()
    return fit


def timed(bench: Bench, model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Memory and time of training steps, after two that do not count."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def autocast_loss() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return loss()

    def step() -> None:
        autocast_loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    peak = peak_memory(step) if bench.device.type == "cuda" else training_peak(autocast_loss, model)
    times = []
    for _ in range(bench.steps):
        wait(bench.device)
        start = time.perf_counter()
        step()
        wait(bench.device)
        times.append(1000 * (time.perf_counter() - start))
    count, median = sum(p.numel() for p in trained), round(statistics.median(times), 3)
    return {"trained": count, "peak_bytes": peak, "step_ms": median}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trained(bench: Bench, name: str, way: str) -> dict[str, Any]:
    batch, samples = batch_of(name, bench.tiny, bench.device)
    model = tuned(bench, name, way).model
    return {"samples": samples, **timed(bench, model, lambda: loss_of(model(**batch)))}


def from_cache(bench: Bench, name: str) -> dict[str, Any]:
    """UniPT's side networks on what the frozen model showed once, kept in half precision on the host and moved to the
    card each step, as the activation cache is read. Without heads, and without the disk."""
    batch, samples = batch_of(name, bench.tiny, bench.device)
    fit = tuned(bench, name, "unipt")
    listeners = dict(fit.methods[-1].listeners)
    if reading := [key for key, listener in listeners.items() if listener.memory is not None]:
        raise ValueError(f"the side network of {reading[0]!r} reads another's result, which a cache does not hold")
    shown: dict[str, Seen] = {}
    hooks = []
    for key, listener in listeners.items():

        def keep(_: nn.Module, args: tuple, key: str = key) -> None:
            shown[key] = replace(args[0], maps=list(args[0].maps))  # the side network empties its list

        hooks.append(listener.side.register_forward_pre_hook(keep))
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
        fit.model(**batch)
    for hook in hooks:
        hook.remove()
    pinned = bench.device.type == "cuda"
    held = {key: on_host(seen, pinned) for key, seen in shown.items()}
    sides = nn.ModuleList(listener.side for listener in listeners.values())
    shown.clear()
    del fit
    gc.collect()  # the frozen model is gone: nothing of it is needed

    def loss() -> Tensor:
        return loss_of([listener.side(on_card(held[key], bench.device)) for key, listener in listeners.items()])

    size = sum(x.nbytes for seen in held.values() for x in (*seen.maps, seen.mask, seen.value) if x is not None)
    return {"samples": samples, **timed(bench, sides, loss), "cached_bytes": size}


def on_host(seen: Seen, pinned: bool) -> Seen:
    """What a side network was shown, in half precision, in memory from which a card reads fast."""

    def there(x: Tensor | None) -> Tensor | None:
        x = None if x is None else x.half().cpu() if x.is_floating_point() else x.cpu()
        return x.pin_memory() if pinned and x is not None else x

    return Seen([there(x) for x in seen.maps], there(seen.mask), there(seen.value), seen.position)  # type: ignore[misc,arg-type]


def on_card(held: Seen, device: torch.device) -> Seen:
    """The same on the card, for one step."""
    maps = [x.to(device, non_blocking=True) for x in held.maps]
    mask, value = (None if x is None else x.to(device, non_blocking=True) for x in (held.mask, held.value))
    return Seen(maps, mask, value, held.position)  # type: ignore[arg-type]


def compiled(bench: Bench, name: str, way: str, backend: str) -> dict[str, Any]:
    """Time of a step whose forward and backward torch.compile makes."""
    batch, _ = batch_of(name, bench.tiny, bench.device)
    model = tuned(bench, name, way).model
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend)
    start = time.perf_counter()
    found = timed(bench, model, lambda: loss_of(fast(**batch)))
    return {"compiled_step_ms": found["step_ms"], "compiling_s": round(time.perf_counter() - start, 1)}


def training_steps(bench: Bench, names: list[str]) -> None:
    for name in names:
        full = None
        published = SETTINGS[name].published
        for way in (*WAYS, CACHED):
            work = partial(from_cache, bench, name) if way == CACHED else partial(trained, bench, name, way)
            row = bench.row({"what": "step", "model": name, "way": way}, work)
            if way == "full":
                full = row.get("peak_bytes")
            method = way.partition(",")[0]
            if full and row.get("peak_bytes") is not None:
                row["over_full"] = round(row["peak_bytes"] / full, 4)
            if method in published:
                row["published_over_full"] = round(published[method] / published["full"], 4)


# --- the others -------------------------------------------------------------------------------------------------------


def skipping(bench: Bench) -> None:
    """Latency of a ViLT's encoder over the number of skipped blocks, DAS's adapters in the others."""
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.ViltConfig(**size) if bench.tiny else hf.ViltConfig()
    tokens, counts = (12, (0, 2)) if bench.tiny else (241, (0, 1, 2, 3, 4, 6))

    def measured(skip: int, batch: int) -> dict[str, Any]:
        model = hf.ViltModel(config)
        method, anatomy = trimtab.DAS(skip=skip), trimtab.Anatomy.of(model)
        method.assume(model, anatomy)
        method.attach(model, anatomy)
        encoder = model.encoder.to(bench.device, torch.bfloat16).eval()
        x = torch.randn(batch, tokens, config.hidden_size, device=bench.device, dtype=torch.bfloat16)
        return latency(lambda: encoder(x), repeats=bench.steps * 5)

    for batch in (1, 4 if bench.tiny else 64):
        dense = None
        for skip in counts:
            row = bench.row({"what": "das", "skip": skip, "batch": batch}, partial(measured, skip, batch), 20)
            dense = row.get("median") if skip == 0 else dense
            if dense and "median" in row:
                row["over_none"] = round(row["median"] / dense, 4)


def calibrating(bench: Bench, name: str) -> None:
    """Samples a second of MULTIFLOW's calibration beside forward passes alone."""

    def measured() -> dict[str, Any]:
        batch, samples = batch_of(name, bench.tiny, bench.device)
        model = made(name, bench.tiny, bench.device, half=False).eval()
        data = [batch] * (2 if bench.tiny else 8)

        def forward() -> None:
            with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
                for one in data:
                    model(**one)

        def prune() -> None:
            trimtab.prune(model, "multiflow", [0.5], data, precision="bf16")

        def select() -> None:
            trimtab.prune(model, "multiflow", [0.5], data[:1], precision="bf16")

        seconds = {}
        for key, work in (("forward", forward), ("select", select), ("whole", prune)):
            if key == "forward":
                work()
            wait(bench.device)
            start = time.perf_counter()
            work()
            wait(bench.device)
            seconds[key] = time.perf_counter() - start
        # The work on scores and masks, and one batch, are taken off: what is left is for the further batches.
        alone = seconds["forward"] * (len(data) - 1) / len(data)
        more = seconds["whole"] - seconds["select"]
        if more <= 0:
            raise ValueError(f"{len(data)} batches took no longer than one: too short to tell")
        return {"forward_samples_a_second": round(samples * len(data) / seconds["forward"], 1),
                "calibration_samples_a_second": round(samples * (len(data) - 1) / more, 1),
                "over_forward": round(more / alone, 3), "whole_s": round(seconds["whole"], 3)}  # fmt: skip

    bench.row({"what": "calibration", "model": name}, measured, 90)


def sparse_kernels(bench: Bench) -> None:
    """Linear layers of the models' sizes whose weights are 2 of 4: dense and semi-structured kernels."""
    sizes = [(32, 64)] if bench.tiny else [(768, 3072), (1152, 4304), (2048, 6144), (4096, 4096)]

    def measured(into: int, out: int, tokens: int) -> dict[str, Any]:
        layer = nn.Linear(into, out, device=bench.device, dtype=torch.bfloat16)
        groups = layer.weight.detach().view(out, -1, 4)
        groups.scatter_(2, groups.abs().topk(2, dim=2, largest=False).indices, 0)
        (found,) = speed_up(nn.Sequential(layer), tokens).layers
        if found.ratio is None:
            raise ValueError(found.why)
        return {"dense_ms": found.dense_ms, "sparse_ms": found.sparse_ms, "ratio": round(found.ratio, 4),
                "faster": found.converted}  # fmt: skip

    for into, out in sizes:
        for tokens in (64, 4096):
            about = {"what": "2:4", "in": into, "out": out, "tokens": tokens}
            bench.row(about, partial(measured, into, out, tokens), 20)


# --- telling ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people: training steps as columns of one table, the others a line each."""
    lines = ["| model | way | trained | peak GB | : full | published : full | step ms | compiled ms |  |",
             "|---|---|---:|---:|---:|---:|---:|---:|---|"]  # fmt: skip
    quick = {(r["model"], r["way"]): r for r in rows if r["what"] == "compiled"}
    for r in (r for r in rows if r["what"] == "step"):
        fast = quick.get((r["model"], r["way"]), {})
        peak = None if r.get("peak_bytes") is None else round(r["peak_bytes"] / 1e9, 3)
        cells = (r.get("trained"), peak, r.get("over_full"), r.get("published_over_full"), r.get("step_ms"),
                 fast.get("compiled_step_ms"))  # fmt: skip
        why = r.get("failed") or fast.get("failed", "")
        shown = " | ".join("-" if c is None else f"{c:,}" for c in cells)
        lines.append(f"| {r['model']} | {r['way']} | {shown} | {why} |")
    for r in (r for r in rows if r["what"] not in ("step", "compiled")):
        lines.append(", ".join(f"{k} {v}" for k, v in r.items()))
    return "\n".join(lines)


def main(bench: Bench, names: list[str], backend: str) -> None:
    skipping(bench)
    sparse_kernels(bench)
    for name in names:
        if name in ("SigLIP-so400m", "CLIP4Clip"):
            calibrating(bench, name)
    training_steps(bench, names)
    if backend != "none":
        for way in COMPILED:
            for name in names:
                about = {"what": "compiled", "model": name, "way": way}
                bench.row(about, partial(compiled, bench, name, way, backend))
    print(json.dumps(bench.found(), indent=1))
    print(table(bench.rows), file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="MODEL")
    parser.add_argument("--budget", type=float, default=460, help="seconds for all measurements")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--compile", default="inductor", help="torch.compile's backend, or none")
    parser.add_argument("--out", type=Path, help="also write the JSON here, after each measurement")
    given = parser.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        parser.error("no CUDA GPU is here; --tiny runs tiny models on the CPU")
    warnings.filterwarnings("ignore")
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    main(Bench(place, given.tiny, given.budget, given.steps, given.out), given.models, given.compile)

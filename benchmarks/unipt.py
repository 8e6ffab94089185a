"""UniPT's side networks beside a literal version of the published computation: bytes kept for backward, time of a step.

    python benchmarks/unipt.py [--repeats 9] [--only vse] > docs/tune/unipt.json

The literal version (`trimtab.methods.tune.unipt.plain`) makes all attention weights, adds an identity to them, stacks
all layers' results and weights the stack; it works on the same parameters. Ours makes the scores again in the
backward pass where they are many (`auto`, the default), keeps them all (`keep`, where the side network has the
choice), or keeps the frozen maps for the backward pass in bfloat16 (`bf16`). Errors are of ours against the literal
version in double precision. Sizes are the papers', batches smaller; sums over a setting's parts are per sample, as a
step trains all parts on as many samples. A step is forward and backward of the side network alone, without the frozen
backbone and the optimiser. Times are of the processor on one thread, not of the clock, and versions take turns, so
that what else the machine does counts little. `--repeats 0` leaves out times; multiply-adds do not depend on the
machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.counting import saved_bytes
from trimtab.experiments.training import keep_freed_memory
from trimtab.methods.tune.listener import Seen
from trimtab.methods.tune.unipt import PUBLISHED, DecoderUniPT, PyramidUniPT, TokenUniPT, VectorUniPT
from trimtab.methods.tune.unipt.plain import plain

# --- the sizes --------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A side network with inputs of the papers' sizes; `samples` of the setting's samples are in its batch.

    `read` is what is read of tokens (B, L, out): all but padding, or the first alone.
    """

    name: str
    side: nn.Module
    inputs: Seen
    samples: int
    read: Callable[[Tensor], Tensor] = lambda out: out

    @property
    def seen(self) -> Seen:
        """The inputs with a list of maps of their own, which a side network empties."""
        return replace(self.inputs, maps=list(self.inputs.maps))


def shown(maps: list[Tensor], mask: Tensor | None = None, **more: Tensor | None) -> Seen:
    """What a tower of tokens or grids shows."""
    return Seen(maps, mask, **{"value": maps[-1], **more})


def states(batch: int, length: int, width: int, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, length, width).to(dtype) for _ in range(count)]


def padded(batch: int, length: int, least: int) -> Tensor:
    """Masks of texts or pictures that are `least` to `length` tokens long."""
    lengths = torch.linspace(least, length, batch).long()
    return (torch.arange(length)[None] < lengths[:, None]).float()


def valid(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """What is read of tokens that are padded: what becomes of padding is masked wherever it goes."""
    return lambda out: out * mask[..., None]


def vse() -> list[Part]:
    """BERT-base over 30 words, and ResNeXt-101 over 512 px, both to 1024, reduction 2."""
    text = TokenUniPT(768, 12, 2, PUBLISHED["vse-text"], 1024)
    image = PyramidUniPT([256, 512, 1024, 2048], 1024, 2)
    grids = [torch.randn(4, c, s, s) for c, s in ((256, 128), (512, 64), (1024, 32), (2048, 16))]
    mask = padded(32, 30, 10)
    return [
        Part("text", text, shown(states(32, 30, 768, 13), mask), 32, valid(mask)),
        Part("image", image, shown(grids), 4),
    ]


def clip4clip(dtype: torch.dtype = torch.float32) -> list[Part]:
    """CLIP ViT-B/32 over 12 frames of 224 px (50 tokens), and its text tower over 32 words, reduction 1."""
    text, frames = VectorUniPT(512, 12, 512, 1), VectorUniPT(768, 12, 512, 1)
    mask = padded(16, 32, 8)
    at = mask.sum(dim=1).long() - 1
    return [
        Part("text", text, Seen(states(16, 32, 512, 13, dtype), mask, torch.randn(16, 512), at), 16),
        Part("frames", frames, Seen(states(8 * 12, 50, 768, 13, dtype), None, torch.randn(8 * 12, 512)), 8),
    ]


def clip4clip_half() -> list[Part]:
    """The same with the frozen CLIP in half precision, as published; the side networks are in single."""
    return clip4clip(torch.float16)


def clip_vil(first: bool = True) -> list[Part]:
    """12 joint layers over 20 words and 12 x 20 cells of a picture of 384 x 640 px, reduction 2. Of what they hand on
    the published head reads the first token alone."""
    side = TokenUniPT(768, 12, 2, replace(PUBLISHED["clip-vil"], first=first))
    mask = torch.cat([padded(8, 20, 6), torch.ones(8, 240)], dim=1)
    read = (lambda out: out[:, :1]) if first else valid(mask)
    return [Part("joint", side, shown(states(8, 260, 768, 13), mask), 8, read)]


def clip_vil_tokens() -> list[Part]:
    """The same for a head that reads all tokens."""
    return clip_vil(first=False)


def mdetr() -> list[Part]:
    """3 of 6 encoder layers over 25 x 42 cells of a picture of 800 x 1333 px and 20 words; 3 of 6 over 100 queries."""
    encoder = TokenUniPT(256, 3, 2, PUBLISHED["mdetr-encoder"])
    queries = DecoderUniPT(256, 3, 2, PUBLISHED["mdetr-decoder"], levels=True)
    mask = padded(2, 1070, 800)
    memory = torch.randn(2, 1070, 128, requires_grad=True)
    maps = states(2, 100, 256, 4)
    read = Seen(maps, None, maps[-1][None], memory=memory, memory_mask=mask)
    return [
        Part("encoder", encoder, shown(states(2, 1070, 256, 4), mask), 2, valid(mask)),
        Part("decoder", queries, read, 2),
    ]


SETTINGS = {"vse": vse, "clip4clip": clip4clip, "clip4clip-half": clip4clip_half, "clip-vil": clip_vil,
            "clip-vil-tokens": clip_vil_tokens, "mdetr": mdetr}  # fmt: skip

OURS = ("auto", "keep", "bf16")


# --- measuring --------------------------------------------------------------------------------------------------------


def compare(part: Part, ours: Callable | None = None) -> dict[str, float]:
    """How far outputs and gradients are from the literal version's in double precision, relative to its largest."""
    results, silent = [], without_gradient(part.side)
    exact = (plain, deepcopy(part.side).double(), in_double(part.inputs))
    for function, side, seen in (exact, (ours or type(part.side).__call__, part.side, part.seen)):
        side.zero_grad(set_to_none=True)
        out = part.read(function(side, seen))
        out.square().mean().backward()
        results.append((out.detach(), [p.grad.clone() for n, p in side.named_parameters() if n not in silent]))
    (out, gradients), (found, own) = results
    far = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in zip(gradients, own, strict=True)])
    return {
        "output_error": float((out - found).abs().max() / out.abs().max()),
        "gradient_error": float(far.max()),  # a NaN stays one
    }


def in_double(value):
    """Inputs in double precision, token numbers as they are."""
    if isinstance(value, Seen):
        return Seen(**{f.name: in_double(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, list):
        return [in_double(v) for v in value]
    return value.double() if value is not None and value.is_floating_point() else value


def without_gradient(side: nn.Module) -> set[str]:
    """Parameters whose gradient is 0 but for rounding: softmax ignores the gate's bias, BatchNorm that of what it
    normalises."""
    ahead = {f"{name}.0.bias" for name, module in side.named_modules() if isinstance(module, nn.Sequential)
             and isinstance(module[1], nn.BatchNorm2d) and module[1].training}  # fmt: skip
    return {"gate.bias", *ahead}


def step(function: Callable, part: Part) -> float:
    start = time.process_time()
    part.read(function(part.side, part.seen)).sum().backward()
    seconds = time.process_time() - start
    part.side.zero_grad(set_to_none=True)
    return seconds


def products(function: Callable, part: Part) -> int:
    """Multiply-adds of a step's matrix products and convolutions, in millions."""
    with FlopCounterMode(display=False) as counter:
        part.read(function(part.side, part.seen)).sum().backward()
    part.side.zero_grad(set_to_none=True)
    return counter.get_total_flops() // 2_000_000


def versions(part: Part) -> dict[str, Callable]:
    """The literal version and ours."""

    def ours(keep: bool | str, kept: torch.dtype | None = None) -> Callable:
        def call(side: nn.Module, seen: Seen) -> Tensor:
            side.how = replace(side.how, keep=keep, kept=kept)
            return side(seen)

        return call

    return {"literal": plain, "auto": ours("auto"), "keep": ours(True), "bf16": ours("auto", torch.bfloat16)}


def measure(part: Part, repeats: int) -> dict:
    """Kilobytes kept for backward, millions of multiply-adds and milliseconds a step of every version, a sample."""
    made = versions(part)
    kept = {k: saved_bytes(lambda f=f: part.read(f(part.side, part.seen)).sum(), part.side) for k, f in made.items()}
    macs = {k: products(f, part) for k, f in made.items()}
    times: dict[str, list[float]] = {k: [] for k in made}
    for repeat in range(repeats + 2 if repeats else 0):
        for k, f in made.items():
            seconds = step(f, part)
            if repeat >= 2:
                times[k].append(seconds)
    return {
        "part": part.name, "samples": part.samples,
        "kilobytes": {k: round(kept[k] / part.samples / 1e3, 1) for k in made},
        "megamacs": {k: round(macs[k] / part.samples, 1) for k in made},
        "milliseconds": {k: round(1e3 * statistics.median(times[k]) / part.samples, 3) for k in made if repeats},
        **compare(part, made["auto"]),
        "bf16": compare(part, made["bf16"]),
    }  # fmt: skip


def total(name: str, parts: list[dict]) -> dict:
    """Ours as shares of the literal version, summed over the parts."""
    out: dict = {"setting": name}
    for what in ("kilobytes", "megamacs", "milliseconds"):
        if not parts[0][what]:
            continue
        sums = {k: sum(p[what][k] for p in parts) for k in ("literal", *OURS)}
        out[f"{what}_ratio"] = {k: round(sums[k] / sums["literal"], 3) for k in OURS}
    return {**out, "parts": parts}


def main(repeats: int, only: str | None) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    out = []
    for name, make in SETTINGS.items():
        if only in (None, name):
            torch.manual_seed(0)
            out.append(total(name, [measure(part, repeats) for part in make()]))
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": out}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=sorted(SETTINGS))
    options = parser.parse_args()
    main(options.repeats, options.only)

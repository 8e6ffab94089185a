"""What calibration costs on a two-tower model of ViT-B's size, and how the selection of a threshold scales.

    python benchmarks/prune.py [calibration|overhead|agreement|sparsities|selection] [--repeats 3] [--batches 8]

Calibration: CLIP with a ViT-B/32 image tower (224 px) and its text tower (77 tokens, the last ones padding), random
weights. Three works on the same batches, each in a process of its own, by turns, so that a noisy machine is noisy for
all:

    forward    the forward passes alone
    ours       forward passes with `trimtab`'s sums, as MULTIFLOW needs them
    bf16       the same with `precision: bf16`, sums in single precision
    store      forward passes whose hooks keep the inputs of every linear layer (a tensor that query, key and value
               share is kept once), and the same sums made of them afterwards

The seconds of the statistics are those of a work less those of the forward passes in the same round; the statistics'
memory is a process's peak resident set less that of the forward passes. Seconds of the processor are what the process
and its threads ran for; they suffer less from other programs than the clock does. `sums agree` is the largest relative
difference between the two sums of a channel.

Overhead: forward passes with the sums over forward passes alone, batch by batch in one process, so that what else the
machine does falls on both; seconds of the processor.

Agreement: masks of the built-in models, calibrated on the scenes of their pretraining in single precision, against
those of calibration in half precision (`bf16`) and of calibration on as many other rows (`other rows`): the share of
the kept weights that the other mask does not keep.

Selection: `kth_smallest` among 10^8 weights against `torch.kthvalue` and `torch.sort`, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

import trimtab
from trimtab import Anatomy
from trimtab.experiments import assembly, recipe, training
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect
from trimtab.methods.prune.selection import kth_smallest

WORKS = ("forward", "ours", "bf16", "store")
SPARSITIES = [0.63, 0.75, 0.9]


def model_and_batches(batches: int, size: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    mask = (torch.arange(77) < torch.randint(8, 78, (size, 1))).long()
    return model, [
        {
            "input_ids": torch.randint(1, 49000, (size, 77)),
            "attention_mask": mask,
            "pixel_values": torch.randn(size, 3, 224, 224),
        }
        for _ in range(batches)
    ]


def overhead(repeats: int, batches: int, size: int) -> dict:
    """Calibration over forward passes alone, batch by batch in turn."""
    model, data = model_and_batches(batches, size)
    anatomy = Anatomy.of(model)
    calibration = Calibration(model, model, anatomy, lambda: data)
    weights = anatomy.weights(model)

    def forward(batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            model(**batch)

    works = (forward, lambda batch: collect(calibration, weights, {"squares"}, [batch]))
    pairs = []
    for batch in [data[0], *(batch for _ in range(repeats) for batch in data)]:
        seconds = []
        for work in works:
            start = time.process_time()
            work(batch)
            seconds.append(time.process_time() - start)
        pairs.append(seconds)
        print(json.dumps(seconds), file=sys.stderr, flush=True)
    alone, ours = zip(*pairs[1:], strict=True)  # the first pair makes what is made once
    return {"batches": batches, "size": size, "forward_processor_seconds": spread(alone),
            "ours_over_forward": spread([b / a for a, b in pairs[1:]]),
            "ours_over_forward_in_all": round(sum(ours) / sum(alone), 3)}  # fmt: skip


def stored(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean squares of every linear layer's inputs, from inputs that were all kept first."""
    anatomy = Anatomy.of(model)
    kept: dict[str, list[Tensor]] = {}
    handles = []
    for weight in anatomy.weights(model):

        def keep(module, args, path=weight.path):
            kept.setdefault(path, []).append(args[0].detach())

        handles.append(model.get_submodule(weight.module).register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = {}
    for weight in anatomy.weights(model):
        total, samples = torch.zeros(()), 0
        for x, batch in zip(kept.pop(weight.path), batches, strict=True):
            samples += len(x)
            if anatomy.owner(weight.module).mask is not None:
                x = x[batch["attention_mask"].bool()]
            total = total + x.reshape(-1, x.shape[-1]).square().sum(dim=0)
        found[weight.path] = total / samples
    return found


def work(name: str, batches: int, size: int, folder: Path) -> dict[str, float]:
    """One work in this process: seconds by the clock and of the processor, and the peak of the resident set."""
    model, data = model_and_batches(batches, size)
    with torch.no_grad():
        model(**{k: v[:2] for k, v in data[0].items()})  # what is made once is made
    clock, processor = time.perf_counter(), time.process_time()
    if name in ("ours", "bf16"):
        anatomy = Anatomy.of(model)
        precision = "bf16" if name == "bf16" else "fp32"
        calibration = Calibration(model, model, anatomy, lambda: data, precision=precision)
        evidence = collect(calibration, anatomy.weights(model), {"squares"}, data)
        found = {w.path: parts[0].squares for w, parts in evidence.items()}
    elif name == "store":
        found = stored(model, data)
    else:
        found = {}
        with torch.no_grad():
            for batch in data:
                model(**batch)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if found:
        torch.save(found, folder / name)
    return {**seconds, "peak_bytes": peak}


def in_process(*arguments: str) -> dict:
    """What this file prints when it is run with these arguments in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "lowest": round(min(values), digits),
            "highest": round(max(values), digits)}  # fmt: skip


def calibration(repeats: int, batches: int, size: int) -> dict:
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            works = {name: in_process("work", name, str(batches), str(size), folder) for name in WORKS}
            rounds.append(works)
            print(json.dumps(works), file=sys.stderr)
        found = {name: torch.load(Path(folder) / name, weights_only=True) for name in WORKS[1:]}
    store = found["store"]
    error = {
        name: max(float(((found[name][p] - store[p]).abs() / store[p].clamp_min(1e-12)).max()) for p in store)
        for name in ("ours", "bf16")
    }

    def statistics_of(name: str, key: str) -> list[float]:
        return [works[name][key] - works["forward"][key] for works in rounds]

    result: dict = {"batches": batches, "size": size, "linear_layers": len(store), "sums_agree": error["ours"],
                    "bf16_sums_agree": error["bf16"]}  # fmt: skip
    for name in WORKS:
        result[name] = {key: spread([works[name][key] for works in rounds]) for key in rounds[0][name]}
    for key in ("seconds", "processor_seconds"):
        ratios = [w["ours"][key] / w["store"][key] for w in rounds]
        own = [a / b for a, b in zip(statistics_of("ours", key), statistics_of("store", key), strict=True)]
        result[f"ours_over_store_total_{key}"] = spread(ratios)
        result[f"bf16_over_store_total_{key}"] = spread([w["bf16"][key] / w["store"][key] for w in rounds])
        result[f"ours_over_store_statistics_{key}"] = spread(own)
        for name in ("ours", "store"):
            result[f"{name}_statistics_{key}"] = spread(statistics_of(name, key))
    extra = {name: statistics_of(name, "peak_bytes") for name in ("ours", "bf16", "store")}
    for name, values in extra.items():
        result[f"{name}_extra_bytes"] = spread(values, 0)
        if name != "store":
            shares = [a / b for a, b in zip(values, extra["store"], strict=True)]
            result[f"{name}_over_store_extra_bytes"] = spread(shares, 4)
    return result


def sparsities(batches: int, size: int) -> dict[str, float]:
    """Seconds of one sparsity and of three, calibration included."""
    model, data = model_and_batches(batches, size)
    seconds = {}
    for name, wanted in (("warm", SPARSITIES[:1]), ("one", SPARSITIES[:1]), ("three", SPARSITIES)):
        start = time.process_time()
        trimtab.prune(model, "multiflow", wanted, data[:1] if name == "warm" else data)
        seconds[name] = round(time.process_time() - start, 2)
    return {"one_processor_seconds": seconds["one"], "three_processor_seconds": seconds["three"],
            "three_over_one": round(seconds["three"] / seconds["one"], 3)}  # fmt: skip


def agreement(batches: int, size: int) -> dict[str, dict]:
    """Shares of the weights that masks keep which others of the same model, pruner and sparsity do not."""
    out: dict[str, dict] = {}
    for backbone, (pruner, sparsity) in product(
        ("tiny-vilt", "tiny-blip"), product(("multiflow", "wanda"), SPARSITIES)
    ):
        found = {}
        for name in ("fp32", "bf16", "other rows"):
            precision = "bf16" if name == "bf16" else "fp32"
            raw = {
                "backbone": backbone, "task": {"name": "matching", "pool": 25, "words": "next"},
                "data": {"name": "pictograms", "style": "twemoji-varied", "train": 2 * batches * size, "test": 50,
                         "validation": 32, "per_scene": 1},
                "training": {"steps": 0, "batch_size": size},
                "methods": [{"name": pruner, "sparsity": sparsity, "batches": batches, "precision": precision}],
            }  # fmt: skip
            r = recipe.expand(raw, "agreement")[0]
            parts = assembly.assemble(r)
            train, validation, _ = assembly.tables(r, parts)
            rows = range(batches * size) if name != "other rows" else range(batches * size, 2 * batches * size)
            session = training.TrainingSession(parts.model, train.select(rows), validation, r.training, 0, name)
            calibration = Calibration.of(session, batches, size, precision)
            (found[name],) = parts.methods[0].masks(calibration, [sparsity])
        kept = sum(int(m.sum()) for m in found["fp32"].values())
        for name in ("bf16", "other rows"):
            lost = sum(int((m & ~found[name][path]).sum()) for path, m in found["fp32"].items())
            out.setdefault(f"{backbone}, {pruner}", {}).setdefault(name, {})[str(sparsity)] = round(lost / kept, 5)
    return out


def select(name: str, count: int) -> dict[str, float]:
    """The 63 % smallest of `count` random numbers, in twelve tensors as a model would have them."""
    torch.manual_seed(0)
    tensors = list(torch.rand(count).split(-(-count // 12)))
    kth = int(0.63 * count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    clock, processor = time.perf_counter(), time.process_time()
    if name == "radix":
        found = kth_smallest(tensors, kth)
    elif name == "kthvalue":
        found = torch.cat(tensors).kthvalue(kth).values
    elif name == "sort":
        found = torch.cat(tensors).sort().values[kth - 1]
    else:
        raise ValueError(name)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**seconds, "extra_bytes": peak - before, "found": float(found)}


def selection(repeats: int, count: int) -> dict:
    names = ("radix", "kthvalue", "sort")
    rounds = [{n: in_process("select", n, str(count)) for n in names} for _ in range(repeats)]
    assert len({one["found"] for works in rounds for one in works.values()}) == 1, rounds
    keys = ("seconds", "processor_seconds", "extra_bytes")
    return {"weights": count, **{n: {k: spread([works[n][k] for works in rounds]) for k in keys} for n in names}}


def main() -> None:
    if sys.argv[1:2] == ["work"]:
        name, batches, size, folder = sys.argv[2:]
        print(json.dumps(work(name, int(batches), int(size), Path(folder))))
        return
    if sys.argv[1:2] == ["select"]:
        print(json.dumps(select(sys.argv[2], int(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=["calibration", "overhead", "agreement", "sparsities", "selection"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="rows a batch")
    parser.add_argument("--weights", type=int, default=10**8)
    parser.add_argument("--out", type=Path, help="a JSON file, whose other results are kept")
    options = parser.parse_args()
    works = {
        "calibration": lambda: calibration(options.repeats, options.batches, options.size),
        "overhead": lambda: overhead(options.repeats, options.batches, options.size),
        "agreement": lambda: agreement(options.batches, options.size),
        "sparsities": lambda: sparsities(options.batches, options.size),
        "selection": lambda: selection(options.repeats, options.weights),
    }
    info = {"threads": torch.get_num_threads(), "torch": torch.__version__, "repeats": options.repeats}
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for name in [options.what] if options.what else works:
        result[name] = {**info, **works[name]()}
    print(text := json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""UniPT and its rivals where UniPT's paper stands: real towers that never met learn to find photographs by captions.

    python studies/vse.py --root flickr8k [--ways linear-probe unipt-text] [--seeds 0 1 2 3 4]     train what is missing
    python studies/vse.py --root flickr8k --ways lst-text --seeds 0 --rates 4e-3       at one learning rate more
    python studies/vse.py --tables [--summary] [--plot FILE.png]
    python studies/vse.py --compare partial-1 unipt-text@5e-4                     that at a rate that was not chosen

EfficientNet-Lite0 (96 pixels) and MiniLM, VSE-infinity's pooling and triplets, Flickr8K: 6,000 photographs to train on,
320 for validation, 1,000 with their 5,000 captions to test on; rSum, the six recalls in percent added. By the rules of
README.md: batches of 128, a constant learning rate until validation rSum, looked at every fifth epoch, has not risen
for two looks, then a linear fall over a quarter of the steps so far, 100 epochs at most (the ways `..., 25 epochs` as
UniPT and VSE-infinity train: 25 epochs, a tenth of the rate after 15). Each way is trained at three
learning rates with seed 0; the rate with the best validation rSum at the end is taken for the other seeds. Full tuning
is tried at one, and so are all layers of MiniLM, whole, pruned or shortened, and for 25 epochs SHERL, small LoRA,
adapters and BitFit (the middle one); what LST's start gives, and what UniPT's parts and width give, is asked at that of
LST and of UniPT.
`--rates` adds some where the best is the highest or lowest.

Frozen towers are computed once, on ten crops of each photograph with a caption drawn for each: five whole ones are
soon learned by heart (the ways `..., whole`). The draws are the same for all seeds: the spread over seeds leaves out
what they add. One line a training in `studies/results/vse.jsonl`, with what each test photograph gives to rSum and
the training loss of its last epoch; what is there is not trained again, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from each import RetrievalEach
from photographs import files
from protocol import ALONE, Trials, alone_cells, apart, compared, picture, summary
from tables import cell

from trimtab.experiments.estimate import estimate
from trimtab.experiments.recipe import expand
from trimtab.methods import METHODS
from trimtab.methods.tune.unipt import UniPT
from trimtab.report.runs import COSTS
from trimtab.report.tables import amount

RESULTS = Path(__file__).parent / "results" / "vse.jsonl"
EPOCH = 47
TEXT = {"towers": ["text"]}
NEW = (5e-4, 1e-3, 2e-3)  # learning rates of what starts random
MOVED = (5e-5, 1e-4, 2e-4)  # and of pretrained weights
LAYERS_RATE = (2e-4,)  # of all layers, whole, pruned or shortened: the highest of those
MIDDLE = (1e-3,)  # of NEW
LIKE_UNIPT = (2.5e-4,)  # the rate that UniPT's trials chose: nothing differs but what is left out, or the width


@METHODS.register("unipt-of-means")
class OfMeans(UniPT):
    """UniPT without confidences: all layers count alike."""

    def stand(self, *where: Any) -> Any:
        stand = super().stand(*where)
        stand.side.gate.weight.requires_grad_(False).zero_()  # a softmax of zeros
        return stand


@METHODS.register("unipt-without-attention")
class WithoutAttention(UniPT):
    """UniPT without its parallel interaction: a token reads the earlier layers at its own place only."""

    def stand(self, *where: Any) -> Any:
        stand = super().stand(*where)
        stand.side.how = replace(stand.side.how, eps=1e30)  # of which rows of attention weights are divided by
        return stand


@dataclass(frozen=True)
class Way:
    """Methods, the learning rates that are tried, and the heads' as a multiple of them."""

    methods: tuple[dict[str, Any], ...]
    rates: tuple[float, ...] = NEW
    head: float = 1.0
    fresh: bool = True  # ten crops of a photograph, and tokens left out of the pooling; False: five whole ones
    epochs: int | None = None  # so many, the rate a tenth after three fifths of them; None: to the plateau
    best: bool = False  # weights of the look with the highest validation rSum; False: of the last step


def _way(name: str, *more: Any, **settings: Any) -> Way:
    return Way(({"name": name, **settings},), *more)


def _composed(*methods: dict[str, Any]) -> Way:
    return Way(methods)


UNIPT = {"name": "unipt", "form": "token", **TEXT}
PRUNE = {"name": "multiflow", "sparsity": 0.63}
SPARSEGPT = {"name": "sparsegpt", "sparsity": 0.63}
SKIP = {"name": "das", "skip": 2, "search_steps": 60, "adapters": "none", **TEXT}

WAYS = {
    "linear-probe": _way("linear-probe"),
    "unipt-text": _composed(UNIPT),
    "unipt": _way("unipt", form="token", layers=[1, 3, 5]),
    "lst-text": _way("lst", **TEXT),
    "lst-text, random": _way("lst", (2e-3,), initialise="random", **TEXT),  # at the rate that LST's trials chose
    "sherl-text": _way("sherl", **TEXT),
    "side-tuning": _way("side-tuning", **TEXT),
    "partial-1": _way("partial", MOVED, 10.0, blocks=1, **TEXT),
    "partial-3": _way("partial", MOVED, 10.0, blocks=3, **TEXT),
    "bitfit-text": _way("bitfit", **TEXT),
    "lora-text": _way("lora", **TEXT),
    "lora-text-all-16": _way("lora", rank=16, alpha=32, targets="all-linear", **TEXT),  # of UniPT's size
    "adapter-text": _way("adapter", **TEXT),
    "full": _way("full", (1e-4,), 10.0),  # the middle of those: a training takes two hours
    "unipt-text, of means": _way("unipt-of-means", LIKE_UNIPT, form="token", **TEXT),
    "unipt-text, no attention": _way("unipt-without-attention", LIKE_UNIPT, form="token", **TEXT),
    "linear-probe, whole": replace(_way("linear-probe"), fresh=False),
    "unipt-text, whole": replace(_composed(UNIPT), fresh=False),
    "unipt-text-4": _way("unipt", LIKE_UNIPT, form="token", reduction=4, **TEXT),
    "unipt-text-1": _way("unipt", LIKE_UNIPT, form="token", reduction=1, **TEXT),
    # Levers composed: MiniLM without most of its weights, two of its six layers gone, UniPT beside what is left
    "prune, linear-probe": _composed(PRUNE, {"name": "linear-probe"}),
    "prune, unipt-text": _composed(PRUNE, UNIPT),
    "prune, lora-text": _composed(PRUNE, {"name": "lora", **TEXT}),
    "skip, unipt-text": _composed(SKIP, UNIPT),
    "prune, skip, unipt-text": _composed(PRUNE, SKIP, UNIPT),
}
WAYS |= {f"{way}, best look": replace(WAYS[way], best=True, rates=(rate,))  # at the rates that their trials chose
         for way, rate in {"linear-probe": 2e-3, "unipt-text": 2.5e-4}.items()}  # fmt: skip
# As UniPT and VSE-infinity train: all equally long, whatever validation rows say
LENGTH = ", 25 epochs"
WAYS |= {f"linear-probe, {n} epochs": replace(WAYS["linear-probe"], epochs=n, rates=(2e-3,)) for n in (10, 50, 100)}
WAYS |= {way + LENGTH: replace(WAYS[way], epochs=25) for way in (
    "linear-probe", "unipt-text", "unipt", "lst-text", "sherl-text", "side-tuning", "partial-1", "partial-3",
    "bitfit-text", "lora-text", "lora-text-all-16", "adapter-text", "full", "prune, skip, unipt-text")}  # fmt: skip
# Less than three rates, for want of time
WAYS |= {way + LENGTH: replace(WAYS[way + LENGTH], rates=rates) for way, rates in {
    **dict.fromkeys(("sherl-text", "bitfit-text", "lora-text", "adapter-text"), MIDDLE),
    **dict.fromkeys(("partial-1", "partial-3"), LAYERS_RATE), "lora-text-all-16": (5e-4, 1e-3),
}.items()}  # fmt: skip
# Nine tenths of MiniLM's matrices go, and all six layers are trained, pictures' tower frozen: pruners, at one rate each
PRUNERS: dict[str, dict[str, Any]] = {"multiflow": {}, "multiflow-uniform": {"allocation": "uniform"}} | {
    name: {} for name in ("omp", "wanda", "sparsegpt", "random-pruning")}  # fmt: skip
LAYERS = {"name": "partial", "blocks": 6, **TEXT}
WAYS["partial-6" + LENGTH] = Way((LAYERS,), LAYERS_RATE, 10.0, epochs=25)
WAYS |= {f"{pruner}-0.9, partial-6{LENGTH}": Way(
    ({"name": pruner.removesuffix("-uniform"), "sparsity": 0.9, **settings}, LAYERS), LAYERS_RATE, 10.0, epochs=25)
    for pruner, settings in PRUNERS.items()}  # fmt: skip
# Levers composed again, with all layers that are left trained in UniPT's place
REST = {"name": "partial", "blocks": 4, **TEXT}  # what SKIP leaves
WAYS |= {way + LENGTH: Way(methods, LAYERS_RATE, 10.0, epochs=25) for way, methods in {
    "prune, partial-6": (PRUNE, LAYERS), "skip, partial-4": (SKIP, REST), "prune, skip, partial-4": (PRUNE, SKIP, REST),
    "random-skip, partial-4": ({"name": "random-skip", "skip": 2, "adapters": "none", **TEXT}, REST),
    "skip, prune, partial-4": (SKIP, PRUNE, REST), "sparsegpt, skip, partial-4": (SPARSEGPT, SKIP, REST),
}.items()}  # fmt: skip
WAYS |= {f"{way}, 50 epochs": replace(WAYS[way + LENGTH], epochs=50)
         for way in ("partial-6", "skip, partial-4", "prune, skip, partial-4")}  # fmt: skip


def recipe_of(way: str, rate: float, seed: int, data: dict[str, Any]) -> Any:
    return expand(raw_of(way, rate, seed, data), "vse")[0]


def raw_of(way: str, rate: float, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "title": "VSE study",
        "backbone": {"name": "lite0-minilm"},
        "task": {"name": "retrieval-each", "pooling": "gpo", "objective": "triplet", "all_negatives": EPOCH},
        "data": data,
        "methods": [dict(m) for m in WAYS[way].methods],
        "training": {
            "batch_size": 128, "evaluation_batch": 64, "precision": "auto", "learning_rate": rate,
            "head_multiplier": WAYS[way].head, "schedule": "plateau", "steps": 100 * EPOCH, "evaluate_every": 5 * EPOCH,
            "patience": 2, "save_every": 5 * EPOCH, "log_every": EPOCH,
        },
        "costs": False,
        "seed": seed,
    }  # fmt: skip
    last = WAYS[way].methods[-1]
    if last["name"] in ("lora", "adapter", "bitfit", "full") or last in (LAYERS, REST):
        raw["backbone"]["attention"] = "eager"  # on a CPU in bfloat16 its backward pass is several times as fast
    if WAYS[way].fresh:
        raw["task"]["drop"], raw["training"]["crop"] = 0.2, 0.5
    if epochs := WAYS[way].epochs:
        raw["training"] |= {"schedule": "step", "steps": epochs * EPOCH, "drops": [0.6], "warmup": 0}
        del raw["training"]["patience"]
    if last["name"] != "full":
        raw["training"] |= {"cache": "fp16", "cache_views": 10 if WAYS[way].fresh else 5}
    if WAYS[way].best:
        raw["training"]["load_best_model_at_end"] = True
    return raw


def trials(data: dict[str, Any] | None = None) -> Trials:
    """Of these photographs; of none to see what was measured."""
    data = data or {"name": "files", "train": "none", "test": "none"}
    return Trials(RESULTS, {way: WAYS[way].rates for way in WAYS}, partial(recipe_of, data=data),
                  lambda folder: RetrievalEach.each, table=lambda folder: captions_of(data))  # fmt: skip


def captions_of(data: dict[str, Any]) -> str:
    """A hash of the test rows' captions: wherever photographs lie."""
    rows = [json.loads(line)["captions"] for line in Path(data["test"]).read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# --- tables -----------------------------------------------------------------------------------------------------------


def costs_of(way: str) -> dict[str, Any]:
    """However long it trains; named with its length or without."""
    way = way if way in WAYS else way + LENGTH
    return estimate(recipe_of(way, WAYS[way].rates[0], 0, {"name": "files", "train": "none", "test": "none"}))


SHOWN = [c for c in COSTS if c.key in ("trainable_params", "saved_activation_bytes", "nonzero_params", "macs")]
STORED = [*SHOWN, *(c for c in COSTS if c.key == "checkpoint_bytes")]


ALL_LAYERS = "partial-6" + LENGTH
HEADS, TUNED = "beside heads alone (95 %)", "beside MiniLM tuned (95 %)"
TABLES = {  # what stands beside each way of a table, by the title of its column
    "25 epochs": {HEADS: "linear-probe" + LENGTH},
    "levers together": {TUNED: ALL_LAYERS, HEADS: "linear-probe" + LENGTH},
    "to the plateau": {HEADS: "linear-probe"},
    "90 % pruned": {
        "beside nothing pruned (95 %)": ALL_LAYERS, "beside MULTIFLOW (95 %)": f"multiflow-0.9, {ALL_LAYERS}",
        "beside random (95 %)": f"random-pruning-0.9, {ALL_LAYERS}"},
}  # fmt: skip


def title_of(way: str) -> str:
    """The table of a way: each answers a question of its own."""
    if not WAYS[way].epochs:
        return "to the plateau"
    if "-0.9" in way:
        return "90 % pruned"
    return "25 epochs" if METHODS[WAYS[way].methods[0]["name"]].lever == "tune" else "levers together"


def is_in(table: str, way: str) -> bool:
    return title_of(way) == table or (way == ALL_LAYERS and table != "to the plateau")


def tables() -> Iterator[str]:
    """Five: rSum of each way after 25 epochs, and how far it is from that of the heads alone, with a 95 % interval; of
    levers together; of trainings to the plateau; pruned towers, all layers tuned; and costs, also of ways that no
    training was carried out with: what is trained, what autograd keeps for a batch of 128, what is left of the model,
    what is stored, and what a step takes without a cache on a machine that does nothing else (`alone.py`). And what
    the trainings of each took."""
    found = trials().measured()
    for title, beside in TABLES.items():
        shown = ("seeds", "rate (of those tried)", "steps", "loss", "rSum", *beside, "R@1 of texts, pictures (%)")
        yield f"| {title} | {' | '.join(shown)} |"
        yield "|---|" + "---:|" * len(shown)
        bases = [found.get(way, {}) for way in beside.values()]
        yield from (row_of(way, mine, bases) for way, mine in found.items() if is_in(title, way))
        yield ""
    alone = trials().steps_alone()
    yield "| | " + " | ".join([*(c.title for c in STORED), *ALONE]) + " |"
    yield "|---|" + "---:|" * (len(STORED) + 2)
    for name in sorted({*once(found), *alone}, key=list(once(WAYS)).index):
        costs = costs_of(name)
        cells = [amount(costs[c.key], c.units) for c in STORED]
        yield f"| {name} | {' | '.join([*cells, *alone_cells(alone.get(name))])} |"
    yield ""
    for title in TABLES:
        yield f"{title}: {trials().effort([way for way in WAYS if title_of(way) == title])}"


def plain(way: str) -> str:
    """The way, however long it trains."""
    return way.removesuffix(LENGTH)


def once(ways: Iterable[str]) -> dict[str, str]:
    """Ways by their names without a length; not heads alone at other lengths, since their steps are the same."""
    return {plain(way): way for way in ways if plain(way) != way or not WAYS[way].epochs}


def row_of(way: str, mine: dict[int, Any], bases: list[dict[int, Any]]) -> str:
    """Means over seeds: steps, the training loss of the last epoch, rSum and first recalls on test rows."""
    steps, loss = round(fmean(r["steps"] for r in mine.values())), fmean(r["loss"] for r in mine.values())
    firsts = [fmean(100 * r["test"][f"{d} recall@1"] for r in mine.values())
              for d in ("image to text", "text to image")]  # fmt: skip
    return (f"| {plain(way)} | {len(mine)} | {trials().told_rate(way)} | {steps} | {loss:.1f} | "
            f"{cell([r['test']['rsum'] for r in mine.values()])} | {' | '.join(apart(mine, b) for b in bases)} | "
            f"{firsts[0]:.1f}, {firsts[1]:.1f} |")  # fmt: skip


def scores() -> dict[str, list[float]]:
    """rSum of ways after 25 epochs, but for those without nine tenths of the matrices."""
    return {plain(way): [r["test"]["rsum"] for r in mine.values()] for way, mine in trials().measured().items()
            if way.endswith(LENGTH) and title_of(way) != "90 % pruned"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("flickr8k"), help="Flickr8K in its official layout")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="rates at which seed 0 is trained too")
    parser.add_argument("--work", type=Path, default=Path("runs/vse-study"), help="for what trainings leave")
    parser.add_argument("--tables", action="store_true", help="print what was measured")
    parser.add_argument("--summary", action="store_true", help="print scores and costs in one table")
    parser.add_argument("--plot", type=Path, help="draw what was measured into this PNG file")
    parser.add_argument("--compare", nargs=2, metavar="WAY[@RATE]", help="how far the first is from the second")
    options = parser.parse_args()
    if options.compare:
        if unknown := [name for name in options.compare if name.partition("@")[0] not in WAYS]:
            parser.error(f"--compare: {unknown[0]!r} is none of {', '.join(WAYS)}")
        study = trials()
        at = {name: study.at(name) for name in options.compare if "@" in name}
        print(compared(study.measured() | at, *options.compare))
        return
    if options.tables:
        print("\n".join(tables()))
    if options.summary or options.plot:
        costs = {way: costs_of(way) for way in scores()}
    if options.summary:
        found = summary(scores(), "rSum", lambda way, key: costs[way][key], STORED, trials().steps_alone())
        print("\n".join(found))
    if options.plot:
        options.plot.write_bytes(picture(scores(), lambda way, key: costs[way][key], SHOWN, "rSum"))
    if options.tables or options.summary or options.plot:
        return
    trials(files(options.root, options.work)).fill(options.ways, options.seeds, options.work, tuple(options.rates))


if __name__ == "__main__":
    main()

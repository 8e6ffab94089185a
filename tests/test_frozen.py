"""A step from the cache is the step of the whole model, for each method, form, task and kind of backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tasks.test_videos import films_of
from tests.tasks.tiny import BACKBONES, COLOURS, picture
from tests.tasks.tiny import table as made_up
from trimtab.backbones import load
from trimtab.data import video
from trimtab.data.pictograms import load as pictograms
from trimtab.data.sources import SOURCES
from trimtab.data.video import Length
from trimtab.experiments import collation
from trimtab.experiments.cached import CachedModel, TableCache
from trimtab.methods import METHODS
from trimtab.methods.tune import cache as stored
from trimtab.methods.tune.frozen import Playing, Recording
from trimtab.methods.tune.watching import Example, Watcher
from trimtab.tasks import TASKS, TaskModel

ROWS = 12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 6)
    monkeypatch.setattr(collation, "RUN_ROWS", 3)
    monkeypatch.setattr(video, "read", lambda path, rule: [picture(COLOURS[i % 3]) for i in rule(Length(4, 2.0))])


@pytest.fixture(scope="module")
def table() -> Callable[[str], Any]:
    """Rows of a task, each made once."""
    made: dict[str, Any] = {}

    def get(task: str) -> Any:
        if task not in made:
            kind = "retrieval" if task == "captioning" else TASKS[task].schema or task
            if task == "video-retrieval":
                made[task] = films_of()
            elif task in ("retrieval", "vqa", "captioning"):
                made[task] = pictograms(kind, rows=ROWS, seed=0, progress=False)
            else:
                made[task] = made_up(kind, ROWS)
        return made[task]

    return get


def tuned(backbone: str, task: dict, method: str, settings: dict) -> tuple[TaskModel, Any]:
    torch.manual_seed(0)
    made = BACKBONES[backbone]() if backbone in BACKBONES else load(backbone, pretrained=False)
    if not made.pictures.fixed:
        made.pictures = made.pictures.squashed(32)
    made.limit_text(12)
    given = TASKS[task["name"]].settings_from(SOURCES["pictograms"](), {k: v for k, v in task.items() if k != "name"})
    model = TaskModel(made, TASKS[task["name"]](**given))
    made.requires_grad_(False)
    found = METHODS[method](**settings)
    found.attach(made.model, made.anatomy)
    return model, found


def whole(cache: TableCache, rows: list[int]) -> dict[str, Tensor]:
    """The same samples, collated: padded to the longest of them, as without a cache."""
    groups = {i: cache.collation.group(0, i, min(i + 3, len(cache))) for i in {3 * (r // 3) for r in rows}}
    parts = [{k: v[r % 3 : r % 3 + 1] for k, v in groups[3 * (r // 3)].items()} for r in rows]
    length = max(int(p.pop("lengths", torch.zeros(1))) for p in parts)
    out = {k: torch.cat([cache.collation.padded(k, p[k]) for p in parts]) for k in parts[0]}
    return {k: v[:, :length] if k in cache.collation.text_keys else v for k, v in out.items()}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch)["loss"]
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


GPO = {"name": "retrieval", "pooling": "gpo", "objective": "triplet", "all_negatives": 9}
RETRIEVAL, VQA, PAIRS, ENTAILMENT = ({"name": n} for n in ("retrieval", "vqa", "pairs", "entailment"))
NAMED = {"name": "classification", "classes": COLOURS}
LITE = pytest.mark.skipif(not pytest.importorskip("importlib").util.find_spec("efficientnet_lite_pytorch"),
                          reason="efficientnet-lite-pytorch is not installed")  # fmt: skip
TEXT, SMALL = {"towers": ("text",)}, {"reduction": 2}
CASES = [  # backbone, task, method, settings, blocks that need not run: all, or some
    ("clip", RETRIEVAL, "unipt", SMALL, True),  # vectors
    ("clip", RETRIEVAL, "unipt", {**SMALL, "form": "token"}, True),
    ("clip", RETRIEVAL, "unipt", {**SMALL, **TEXT}, True),  # a tower without a side network
    ("clip", GPO, "unipt", {**SMALL, "form": "token"}, True),
    ("clip", GPO, "lst", SMALL, True),
    ("clip", RETRIEVAL, "side-tuning", SMALL, True),
    ("clip", RETRIEVAL, "sherl", SMALL, False),
    ("clip", RETRIEVAL, "partial", {"blocks": 1}, False),
    ("clip", GPO, "linear-probe", {}, True),
    ("clip", RETRIEVAL, "lora", {**TEXT, "rank": 2}, False),  # one tower of two
    ("clip", {**NAMED, "prompts": ("a {}", "the {}")}, "unipt", SMALL, True),  # what is the same for every batch
    ("vit", NAMED, "unipt", SMALL, True),
    ("swin", NAMED, "unipt", SMALL, True),  # stages
    ("tiny-vilt", VQA, "unipt", {}, True),  # one stream
    ("tiny-vilt", VQA, "partial", {"blocks": 1}, False),
    ("tiny-vilt", {"name": "captioning"}, "linear-probe", {}, True),
    ("meter", PAIRS, "unipt", SMALL, True),  # towers that read each other, and two runs of each
    ("meter", ENTAILMENT, "lst", SMALL, True),
    ("blip pairs", PAIRS, "unipt", SMALL, True),  # memories of two pictures, joined
    ("blip pairs", PAIRS, "sherl", SMALL, False),
    ("xvlm", {"name": "box-regression"}, "unipt", SMALL, True),
    ("mdetr", {"name": "set-grounding"}, "unipt", SMALL, True),  # levels of a decoder that reads an encoder
    ("mdetr", {"name": "set-grounding"}, "linear-probe", {}, True),
    ("meanP", {"name": "video-retrieval", "frames": 2}, "unipt", SMALL, True),  # frames
    pytest.param("lite0-minilm", GPO, "unipt", {"layers": (1, 3, 5)}, True, marks=LITE),  # grids, and texts behind maps
    pytest.param("lite0-minilm", RETRIEVAL, "lst", TEXT, True, marks=[LITE, pytest.mark.slow]),
]


@pytest.mark.parametrize(("backbone", "task", "method", "settings", "every"), CASES)
def test_a_step_is_that_of_the_whole_model(backbone, task, method, settings, every, table, tmp_path):
    model, found = tuned(backbone, task, method, settings)
    cache = TableCache(model, [found], table(task["name"]), tmp_path / "cache", "fp32")
    cache.fill()
    held, blocks = cache.held
    assert held == blocks if every else 0 < held < blocks
    count = len(cache)
    rows = [r % count for r in (7, 0, 4, 10)] if count > 4 else [2, 0, 1]
    loss, grads = gradients(CachedModel(cache).eval(), cache.batch(rows))
    wanted, exact = gradients(model.eval(), whole(cache, rows))
    assert loss == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert grads.keys() == exact.keys() and grads
    largest = max(float(g.abs().max()) for g in exact.values())
    for name, gradient in exact.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-4 * largest, rtol=1e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-2), ("int8", 0.2)])
@pytest.mark.parametrize(
    ("backbone", "task", "method"),
    [
        ("clip", RETRIEVAL, "unipt"),
        ("meter", {"name": "entailment"}, "lst"),
        ("mdetr", {"name": "set-grounding"}, "unipt"),
    ],
)
def test_narrow_caches_are_off_by_their_rounding(backbone, task, method, precision, tolerance, table, tmp_path):
    model, found = tuned(backbone, task, method, SMALL)
    cache = TableCache(model, [found], table(task["name"]), tmp_path / "cache", precision)
    cache.fill()
    loss, grads = gradients(CachedModel(cache).eval(), cache.batch([7, 0, 4]))
    wanted, exact = gradients(model.eval(), whole(cache, [7, 0, 4]))
    assert loss == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    a, b = (torch.cat([g[n].flatten() for n in exact]) for g in (grads, exact))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 1 - tolerance


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_frozen_side_network_is_a_part_of_what_a_cache_belongs_to(precision, table, tmp_path):
    keys = []
    for method, settings in (("unipt", {**SMALL, "form": "token"}), ("lst", SMALL), ("lst", {"reduction": 4})):
        for frozen in (False, True):
            model, found = tuned("clip", RETRIEVAL, method, settings)
            found.listeners["vision"].side.requires_grad_(not frozen)
            cache = TableCache(model, [found], table("retrieval"), tmp_path / "none", precision)
            keys.append(json.dumps(cache.key, sort_keys=True))
    assert keys[0] == keys[2] == keys[4], "what they read is the same"
    assert len({*keys[1::2], keys[0]}) == 4, "what is recorded depends on the frozen one"


def test_a_frozen_side_network_that_another_reads_is_refused(table, tmp_path):
    model, found = tuned("blip pairs", PAIRS, "unipt", SMALL)
    read = next(x.memory for x in found.listeners.values() if x.memory is not None)
    read.side.requires_grad_(False)
    with pytest.raises(ValueError, match=r"cache: the side network of 'vision', whose result .* is frozen"):
        TableCache(model, [found], table("pairs"), tmp_path / "cache")


# --- what is not what it seems ----------------------------------------------------------------------------------------


class Task:
    """A task on a hand-made model, of whose batches only `x` and a text are known."""

    name, least, sees = "made-up", 1, "image"

    @staticmethod
    def collate(backbone: Any, rows: list[dict], train: bool) -> dict[str, Tensor]:
        length = max(len(r["ids"]) for r in rows)
        ids = torch.tensor([r["ids"] + [0] * (length - len(r["ids"])) for r in rows])
        return {"x": torch.tensor([r["x"] for r in rows]), "ids": ids}


class Model(nn.Module):
    """A block and a head; what happens between them is given."""

    def __init__(self, between: Callable):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head, self.between, self.task = nn.Linear(4, 4), nn.Linear(4, 1), between, Task()
        self.block.requires_grad_(False)
        blocks = SimpleNamespace(blocks=lambda: [SimpleNamespace(path="block")])
        self.backbone = SimpleNamespace(name="mine", pictures=SimpleNamespace(fixed=True), model=self, anatomy=blocks)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.between(self, batch)).square().mean()}


class Rows(list):
    column_names = ("x", "ids")


ROWS_OF = Rows({"x": [float(i), 1.0, -0.5 * i, 0.3], "ids": list(range(1, 2 + i % 4))} for i in range(9))


def turned(batch: dict[str, Tensor]) -> Tensor:
    """A text whose padding comes first, (B, L, 4)."""
    return batch["x"][:, None] * batch["ids"].flip(1)[..., None]


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (lambda m, b: nn.functional.dropout(m.block(b["x"])), None),
        (lambda m, b: m.block(nn.functional.dropout(b["x"])), "no block of 'mine' .* at random"),
        (lambda m, b: m.block(b["x"] + m.head.weight), "no block of 'mine' .*a gradient goes through it"),
        (lambda m, b: m.block(b["x"] * m.head.weight.detach()), "no block of 'mine' .*changes with what is trained"),
        (lambda m, b: m.block(b["x"] - b["x"].mean(dim=0)), "no block of 'mine' .*depend on the other samples"),
        (lambda m, b: b["x"], "no block of 'mine' stays the same in training"),
        (lambda m, b: m.block(turned(b)).sum(dim=1) * b["ids"].shape[1], "texts padded further has the loss"),
    ],
    ids=["dropout behind", "dropout before", "trained", "detached", "mean of the batch", "unread", "padding"],
)
def test_what_only_seems_frozen_is_told_from_what_is(between, message, tmp_path, monkeypatch):
    monkeypatch.setattr(collation, "encoded", lambda table: table)
    monkeypatch.setattr(collation, "blanked", lambda row: row)
    if message is None:
        cache = TableCache(Model(between), [], ROWS_OF, tmp_path / "cache", "fp32")
        cache.fill()
        assert "block:0.0" in cache.columns and CachedModel(cache)(**cache.batch([3, 8]))["loss"].isfinite()
        return
    with pytest.raises(ValueError, match=f"cache: .*{message}"):
        TableCache(Model(between), [], ROWS_OF, tmp_path / "cache", "fp32")


class Told(nn.Module):
    """A frozen block that hands on features, and something about the batch."""

    def __init__(self, what: Callable[[Tensor], Any]):
        super().__init__()
        self.inner, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor, ids: Tensor) -> Any:
        return self.inner(x), self.what(ids > 0)


@pytest.mark.parametrize(
    "what",
    [
        lambda real: int(real.sum(dim=1).max()), lambda real: real.sum(dim=1).max().float(),
        lambda real: bool(real.all()), lambda real: None if real.all() else real.sum(),
    ],
    ids=["number", "tensor", "flag", "none"],
)  # fmt: skip
def test_what_was_the_same_for_all_rows_of_the_first_step_must_stay_so(what):
    def between(model: Model, batch: dict[str, Tensor]) -> Tensor:
        found, told = model.block(batch["x"], batch["ids"])
        return found * (1 if told is None else 1 + told)

    model = Model(between)
    model.block = Told(what).requires_grad_(False)
    x, ids = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.ones(5, 6, dtype=torch.long)
    plan = Watcher(model, {}, Example({"x": x, "ids": ids}, torch.tensor((4, 1, 2)))).find()
    recording, playing = Recording(model, {}, plan), Playing(model, {}, plan)
    whole = {"x": -x, "ids": 2 * ids}
    played = playing.run(recording.run(whole), 5)["loss"]
    assert torch.allclose(played, model(**whole)["loss"])
    padded = torch.nn.functional.pad(ids[:, :4], (0, 2))
    with pytest.raises(ValueError, match="cache: what 'block' hands on beside its rows .* depends on the batch"):
        recording.run({"x": x, "ids": padded})

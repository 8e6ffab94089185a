"""A batch that two processes divide has the loss and the gradients of one process on the whole, for every task."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from tests import forked
from tests.tasks.tiny import BACKBONES, _example, tokenizer
from trimtab import divided
from trimtab.backbones.blip.features import backbone as blip
from trimtab.backbones.xvlm.examples import VIT
from trimtab.backbones.xvlm.examples import build as build_xvlm
from trimtab.backbones.xvlm.features import backbone as xvlm
from trimtab.methods.skip.search.evaluate import mean_over_processes
from trimtab.methods.tune.unipt.down import down_grid
from trimtab.tasks import TASKS
from trimtab.tasks.base import TaskModel

ROWS, IGNORED = 8, -100


def _of_xvlm(task: str) -> Callable[[], Any]:
    return lambda: xvlm("xvlm", build_xvlm(VIT, task).eval(), tokenizer())


def _of_blip(name: str) -> Callable[[], Any]:
    return lambda: blip("blip", _example(name), tokenizer())


def uneven(batch: dict[str, Tensor], name: str) -> None:
    """Most of what is learned from stands in the first rows."""
    batch[name][ROWS // 2 + 1 :] = IGNORED


def told_apart(batch: dict[str, Tensor]) -> None:
    """Wrong captions are others."""
    batch["input_ids"] = torch.randint(5, 28, batch["input_ids"].shape)


def binary(batch: dict[str, Tensor]) -> None:
    batch["targets"] = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(3))
    batch["targets"][5:] = 0


def short(batch: dict[str, Tensor]) -> None:
    """Texts of the second half are shorter, and come without the padding of the first."""
    batch["attention_mask"][ROWS // 2 :, 6:] = 0
    batch["input_ids"][ROWS // 2 :, 6:] = 0


def judged(batch: dict[str, Tensor]) -> None:
    """As `Matching.collate` leaves them: words of the first half are learned, pairs of the second are judged."""
    batch["words"][0, 3:6] = 5
    batch["words"][ROWS // 2 :] = IGNORED
    batch["matched"][: ROWS // 2] = IGNORED
    batch["matched"][-2:] = 0
    batch.update({name: values[[0, 2, 4, 6, 1, 3, 5, 7]] for name, values in batch.items()})


ANSWERS = ("yes", "no", "two")
TRUTHS: list[tuple[str, Callable[[], Any], dict[str, Any], Callable[[dict[str, Tensor]], None] | None]] = [
    ("retrieval", BACKBONES["clip"], {}, short),
    ("retrieval", BACKBONES["clip"], {"objective": "triplet"}, None),
    ("retrieval", BACKBONES["clip"], {"objective": "triplet", "all_negatives": 9}, None),
    ("video-retrieval", BACKBONES["meanP"], {"frames": 2}, None),
    ("video-retrieval", BACKBONES["tightTransf"], {"frames": 2}, None),
    ("vqa", BACKBONES["vilt"], {"answers": ANSWERS}, lambda b: uneven(b, "labels")),
    ("vqa", BACKBONES["vilt"], {"answers": ANSWERS, "loss": "binary"}, binary),
    ("classification", BACKBONES["vit"], {"classes": ANSWERS}, lambda b: uneven(b, "labels")),
    ("captioning", _of_blip("blip-pretrain"), {}, lambda b: uneven(b, "labels")),
    ("matching", BACKBONES["vilt"], {"pool": 2}, judged),
    ("reranking", _of_blip("blip-pretrain"), {"objective": "contrast", "k": 2}, short),
    ("reranking", _of_xvlm("retrieval"), {"objective": "contrast", "k": 2}, short),
    ("reranking", BACKBONES["vilt"], {"negatives": 2}, told_apart),
    ("pretraining", _of_blip("blip-pretrain"), {}, short),
    ("pretraining", _of_xvlm("pretrain"), {}, short),
    ("answer-ranking", _of_xvlm("vqa"), {"answers": ANSWERS}, None),
    ("grounding", BACKBONES["vilt"], {}, None),
    ("box-regression", BACKBONES["xvlm"], {}, None),
    ("set-grounding", BACKBONES["mdetr"], {}, None),
    ("entailment", BACKBONES["meter"], {}, lambda b: uneven(b, "labels")),
]  # fmt: skip


def still(model: nn.Module) -> nn.Module:
    """In training, without dropout."""
    model.train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model


def part_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This process's rows, as it would collate them by itself: without padding that only others need."""
    rank, size = dist.get_rank(), ROWS // dist.get_world_size()
    own = {name: values[rank * size : (rank + 1) * size] for name, values in batch.items()}
    if own.get("attention_mask", torch.zeros(0)).ndim == 2 and "labels" not in own and "words" not in own:
        length = int(own["attention_mask"].sum(dim=1).max())
        own |= {name: own[name][:, :length] for name in ("input_ids", "attention_mask")}
    return own


def found(model: nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    """A loss and its gradients, averaged over processes as DistributedDataParallel does."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    value, grads = loss.detach().clone(), {}
    dist.all_reduce(value)
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(grad)
        grads[name] = grad / dist.get_world_size()
    return float(value) / dist.get_world_size(), grads


def compared(model: nn.Module, whole: Callable[[], Tensor], part: Callable[[], Tensor]) -> dict[str, float]:
    """Losses of both ways, and the largest difference of a gradient beside the largest gradient."""
    torch.manual_seed(7)
    truth, wanted = found(model, whole())
    with torch.no_grad():
        alone = mean_over_processes([float(part())], torch.device("cpu"))[0]
    torch.manual_seed(7)
    with divided.divided(), divided.norms(model):
        loss, grads = found(model, part())
    apart = max(float((grads[n] - g).abs().max()) for n, g in wanted.items())
    size = max(float(g.abs().max()) for g in wanted.values())
    return {"whole": truth, "alone": alone, "parts": loss, "apart": apart, "size": size}


def of_task(name: str, make: Callable[[], Any], settings: dict[str, Any], change: Any) -> dict[str, float]:
    torch.manual_seed(0)
    backbone = make()
    backbone.limit_text(8)
    model = still(TaskModel(backbone, TASKS[name](**settings)))
    torch.manual_seed(1)
    batch = {k: v.clone() for k, v in model.example(ROWS).items()}
    batch["pixel_values"] = torch.randn(batch["pixel_values"].shape)
    if change:
        change(batch)
    return compared(model, lambda: model(**batch)["loss"], lambda: model(**part_of(batch))["loss"])


class Normed(nn.Module):
    """A BatchNorm as torch has it, and UniPT's own on grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
        target = down_grid(self.down, y)
        return ((target.x * target.weight + target.bias) ** 3).flatten(1).sum(dim=1).mean()


def of_norms() -> dict[str, float]:
    torch.manual_seed(0)
    one = Normed()
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    x = torch.randn(ROWS, 3, 4, 4) * torch.arange(1, ROWS + 1).view(-1, 1, 1, 1)
    rank = dist.get_rank()
    truth, wanted = found(one, one(x))
    alone = mean_over_processes([float(three(x[rank * 4 : rank * 4 + 4]))], torch.device("cpu"))[0]
    with divided.divided(), divided.norms(two):
        loss, grads = found(two, two(x[rank * 4 : rank * 4 + 4]))
    values = [(grads[n], g) for n, g in wanted.items()] + list(zip(two.buffers(), one.buffers(), strict=True))
    apart = max(float((a - b).abs().max()) for a, b in values)
    size = max(float(b.abs().max()) for _, b in values)
    return {"whole": truth, "alone": alone, "parts": loss, "apart": apart, "size": size}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, float]]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("divided")

    def work() -> None:
        dist.init_process_group("gloo")
        found = {f"{t[0]} {i}": of_task(*t) for i, t in enumerate(TRUTHS)} | {"norms": of_norms()}
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()

    forked.together(work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [f"{t[0]} {i}" for i, t in enumerate(TRUTHS)] + ["norms"])
def test_parts_have_the_loss_and_the_gradients_of_the_whole(case, done):
    for found in (process[case] for process in done):
        assert found["parts"] == pytest.approx(found["whole"], rel=1e-5)
        assert found["size"] > 1e-5 and found["apart"] < 1e-5 * found["size"] + 1e-6


def test_means_of_parts_by_themselves_are_another_loss(done):
    """So that the test above can fail: without what `trimtab.divided` does these would differ."""
    differ = {case for case, found in done[0].items() if found["alone"] != pytest.approx(found["whole"], rel=1e-4)}
    tasks = {case.split()[0] for case in differ}
    assert {"retrieval", "video-retrieval", "vqa", "classification", "captioning", "matching", "reranking",
            "pretraining", "entailment", "norms"} <= tasks  # fmt: skip

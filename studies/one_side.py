"""How far each kind of the built-in world is solved from one side alone: from the words, or from the pictures.

python studies/one_side.py

Words: a linear classifier over words and pairs of neighbouring words. Pictures: two layers over tiny-clip's vector of
each picture, which was trained on this style. Both see 4,000 training rows (3,000 of them fit, 1,000 choose when to
stop); the figures are of 1,000 test rows, and `chance` always gives the commonest label of the training rows. Markdown.
"""

from __future__ import annotations

import io
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab import backbones
from trimtab.data import pictograms
from trimtab.data.images import encoded

KINDS = {"vqa": ("question", "answer"), "programs": ("question", "answer"), "pairs": ("statement", "label"),
         "entailment": ("statement", "label"), "groups": (None, "label")}  # fmt: skip
ROWS, TEST, SEEDS = 4000, 1000, 3


def words(texts: list[str], known: dict[str, int] | None = None) -> tuple[Tensor, dict[str, int]]:
    """Which words and pairs of words each text holds, (N, V), and their numbers."""
    split = [t.rstrip("?").split() for t in texts]
    grams = [set(s) | {f"{a} {b}" for a, b in pairwise(s)} for s in split]
    if known is None:
        known = {g: i for i, g in enumerate(sorted(set().union(*grams)))}
    out = torch.zeros(len(texts), len(known))
    for row, found in enumerate(grams):
        out[row, [known[g] for g in found if g in known]] = 1
    return out, known


@torch.inference_mode()
def pictures(table: Any) -> Tensor:
    """tiny-clip's vectors of a table's pictures, several of a row one behind the other, (N, D)."""
    backbone = backbones.load("tiny-clip").eval()
    column = "images" if "images" in table.column_names else "image"
    cells = table.with_format("arrow")[column].to_pylist()
    cells = [c if isinstance(c, list) else [c] for c in cells]
    found = []
    for start in range(0, len(cells), 100):
        block = [Image.open(io.BytesIO(p["bytes"])) for row in cells[start : start + 100] for p in row]
        found.append(backbone.image(**backbone.images(block)).pooled.reshape(len(cells[start : start + 100]), -1))
    return torch.cat(found)


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    return (model(inputs).argmax(dim=1) == labels).float().mean().item()


def fitted(model: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Trained until the rows that are held back are not told any better."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    held, rest = order[: len(order) // 4], order[len(order) // 4 :]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    best, kept, since = -1.0, {k: v.clone() for k, v in model.state_dict().items()}, 0
    while since < 8:
        for part in rest[torch.randperm(len(rest), generator=generator)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[part]), labels[part]).backward()
            optimizer.step()
        with torch.inference_mode():
            now = accuracy(model, inputs[held], labels[held])
        since = since + 1 if now <= best else 0
        if now > best:
            best, kept = now, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    return model


def side(inputs: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], classes: int, hidden: int) -> list[float]:
    """Test accuracy over seeds of a classifier of one side."""
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        width = inputs[0].shape[1]
        layers = (
            [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(width, classes)]
        )
        model = fitted(nn.Sequential(*layers), inputs[0], labels[0], seed)
        with torch.inference_mode():
            found.append(accuracy(model, inputs[1], labels[1]))
    return found


def shown(values: list[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def main() -> None:
    torch.set_num_threads(1)
    print("| kind | rows | labels | chance (%) | words alone (%) | pictures alone (%) |\n|---|---|---|---|---|---|")
    for kind, (text, label) in KINDS.items():
        train, test = (
            encoded(pictograms.load(kind, "twemoji", split, rows, progress=False))
            if kind != "pairs" else pictograms.load(kind, "twemoji", split, rows, progress=False)
            for split, rows in (("train", ROWS), ("test", TEST))
        )  # fmt: skip
        if "balanced" in train.column_names:  # what another question entails is not scored
            train, test = (t.select([i for i, b in enumerate(t["balanced"]) if b]) for t in (train, test))
        counts = Counter(train[label])
        numbers = {name: i for i, name in enumerate(counts)}
        labels = tuple(torch.tensor([numbers.get(x, -100) for x in t[label]]) for t in (train, test))
        chance = sum(x == counts.most_common(1)[0][0] for x in test[label]) / len(test)
        row = [kind, f"{len(train)} + {len(test)}", str(len(counts)), f"{100 * chance:.1f}"]
        if text is None:
            row.append("-")
        else:
            known = words(train[text])
            row.append(shown(side((known[0], words(test[text], known[1])[0]), labels, len(counts), 0)))
        row.append(shown(side((pictures(train), pictures(test)), labels, len(counts), 256)))
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

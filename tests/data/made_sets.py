"""Small data sets in their official layouts, made for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, kind: str = "JPEG", size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    """A small picture, whatever the file's name says it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 120).save(path, kind)


def write(path: Path, content: Any) -> Path:
    """A text, or something as JSON; tuples as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def karpathy_image(name: str, split: str, captions: list[str], **more: Any) -> dict[str, Any]:
    """An entry of Karpathy's JSON."""
    sentences = [{"raw": text, "tokens": text.lower().split(), "sentid": 10 * len(name) + i}
                 for i, text in enumerate(captions)]  # fmt: skip
    return {"filename": name, "split": split, "sentences": sentences, **more}


def flickr30k(root: Path) -> Path:
    """Two training pictures, one each of validation and test."""
    names = {"1.jpg": "train", "22.jpg": "train", "333.jpg": "val", "4444.jpg": "test"}
    images = [karpathy_image(n, s, [f"A dog, {n}.", " Two cats ."], imgid=i) for i, (n, s) in enumerate(names.items())]
    write(root / "karpathy/dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})
    for name in names:
        picture(root / "flickr30k-images" / name, mode="L")
    return root


def vqav2(root: Path) -> Path:
    """Twelve questions of one picture a split; `red` and, as a word, `two` are common enough for the vocabulary."""
    for part, pictures in (("train2014", (1, 2)), ("val2014", (3,)), ("test2015", (4,))):
        questions, annotations = [], []
        for image in pictures:
            picture(root / part / f"COCO_{part}_{image:012d}.jpg")
            for k in range(6):
                common = ("red", "Two", "rare thing")[k % 3] if k < 5 else "red"
                questions.append({"image_id": image, "question": f"What? {k}", "question_id": 10 * image + k})
                answers = [common] * 8 + ["red", "zebra"] if common != "rare thing" else [f"odd {k}"] * 10
                annotations.append({
                    "question_id": 10 * image + k, "image_id": image, "question_type": "what", "answer_type": "other",
                    "multiple_choice_answer": common,
                    "answers": [{"answer": a, "answer_id": i + 1} for i, a in enumerate(answers)],
                })  # fmt: skip
        write(root / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
        if part != "test2015":
            write(root / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations[::-1]})
    return root


def gqa(root: Path) -> Path:
    """One question a split; all of train in two chunks."""

    def question(image: str, answer: str | None, **more: Any) -> dict[str, Any]:
        told = {} if answer is None else {
            "answer": answer, "fullAnswer": f"It is {answer}.", "entailed": [], "groups": {"global": None},
            "types": {"structural": "query", "semantic": "attr", "detailed": "color"},
            "semantic": [{"operation": "select", "dependencies": [], "argument": "cup (1)"},
                         {"operation": "query", "dependencies": [0], "argument": "color"}],
        }  # fmt: skip
        return {"imageId": image, "question": "What colour is it?", "isBalanced": True, **told, **more}

    for name in ("7", "n8"):
        picture(root / f"images/{name}.jpg")
    folder = root / "questions1.2"
    write(folder / "train_balanced_questions.json", {"01": question("7", "red", groups={"global": "color"})})
    write(folder / "val_balanced_questions.json", {"02": question("7", "blue", entailed=["01"])})
    write(folder / "testdev_balanced_questions.json", {"03": question("n8", "green")})
    write(folder / "test_balanced_questions.json", {"04": question("n8", None)})
    for i in range(11):
        chunk = {f"{100 + i}": question("7", "red", isBalanced=False)}
        write(folder / f"train_all_questions/train_all_questions_{i}.json", chunk)
    return root


def nlvr2(root: Path) -> Path:
    """A statement each of train and dev; the right picture of train is a JPEG named .png."""
    write(root / "data/train.json", (
        {"identifier": "train-5-0-1", "sentence": "The left dog sleeps.", "label": "True", "directory": 12},
    ))  # fmt: skip
    write(root / "data/dev.json", ({"identifier": "dev-6-1-0", "sentence": "Two dogs.", "label": "False"},))
    picture(root / "images/train/12/train-5-0-img0.png", "PNG")
    picture(root / "images/train/12/train-5-0-img1.png", "JPEG", (5, 7))
    for side in (0, 1):
        picture(root / f"dev/dev-6-1-img{side}.png", "PNG")
    return root


def write_illustrator(
    folder: Path, illustrator: str, names: dict[str, str], icons: dict[str, Any], version: str = "1.0.0", **more: Any
) -> Path:
    """A package of drawings as npm would fetch it: their names by code points, and SVG."""
    folder.mkdir(exist_ok=True)
    file = folder / f"iconify-json-{illustrator}-{version}.tgz"
    content = {"chars.json": names, "icons.json": {"icons": icons, "width": 32, "height": 32, **more}}
    with tarfile.open(file, "w:gz") as packed:
        for name, value in content.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return file

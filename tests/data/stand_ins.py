"""A few rows of every published set in its official layout: stand-ins with which recipes run in tests."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.data import official
from tests.data.made_sets import karpathy_image, picture, write

TEXTS = ["a red dog", "two cats and a dog", "a cat", "a red apple left of a dog", "an apple", "two red cats"]
EACH = 6  # rows of a split: as many as a batch of a test needs
SPLITS = ("train", "val", "test")


def captioned(root: Path, name: str) -> None:
    """Karpathy's JSON of a set, and X-VLM's lists of it."""
    images: list[dict[str, Any]] = []
    for split in SPLITS:
        listed = []
        for i in range(5 if split == "test" else EACH):  # which five folds can share
            file = f"{split}{i}.jpg"
            picture(root / "images" / file, size=(20 + i, 30))
            told = [TEXTS[i], f"is it {TEXTS[i]}"]
            images.append(karpathy_image(file, split, told, imgid=len(images), cocoid=len(images), filepath="images"))
            one = split == "train"
            listed += [{"image": f"images/{file}", "caption": c, "image_id": f"coco_{i}"} for c in told] if one else [
                {"image": f"images/{file}", "caption": told}]  # fmt: skip
        write(root / f"{name}_{split}.json" if name == "flickr30k" else root / f"coco_karpathy_{split}.json", listed)
    write(root / f"dataset_{name}.json", {"dataset": name, "images": images})


def vqav2(root: Path, name: str) -> None:
    """The official files, and X-VLM's lists with Visual Genome's questions."""
    for part in ("train2014", "val2014"):
        questions, annotations = [], []
        for i in range(2 * EACH):
            image = i if part == "train2014" else 100 + i
            picture(root / part / f"COCO_{part}_{image:012d}.jpg")
            ids = {"image_id": image, "question_id": 10 * image}
            questions.append({**ids, "question": f"is it {TEXTS[i % 6]}"})
            answer = ("yes", "no")[i % 2]
            annotations.append({
                **ids, "question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_id": k + 1} for k in range(10)],
            })  # fmt: skip
        write(root / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": questions})
        write(root / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations})
        listed = [{"question_id": q["question_id"], "question": q["question"], "dataset": "vqa",
                   "image": f"{part}/COCO_{part}_{q['image_id']:012d}.jpg", "answer": ["yes"] * 7 + ["no"] * 3}
                  for q in questions]  # fmt: skip
        write(root / f"vqa_{part[:-4]}.json", listed)
    picture(root / "vg/image/77.jpg")
    asked = {"question_id": 5, "question": "is it", "image": "image/77.jpg", "answer": "no", "dataset": "vg"}
    write(root / "vg_qa.json", [asked])
    write(root / "answer_list.json", ["yes", "no", "two"])


def gqa(root: Path, name: str) -> None:
    for k, split in enumerate(("train", "val", "testdev")):
        questions = {}
        for i in range(EACH):
            picture(root / f"images/{i}.jpg")
            questions[f"{k}{i}"] = {
                "imageId": str(i), "question": f"is it {TEXTS[i]}", "isBalanced": True, "answer": ("yes", "no")[i % 2],
                "fullAnswer": "yes", "entailed": [], "groups": {"global": None},
                "types": {"structural": "verify", "semantic": "obj", "detailed": "exist"},
                "semantic": [{"operation": "exist", "dependencies": [], "argument": "dog"}],
            }  # fmt: skip
        write(root / f"{split}_balanced_questions.json", questions)


def nlvr2(root: Path, name: str) -> None:
    for split in ("train", "dev", "test1"):
        rows = []
        for i in range(EACH):
            more = {"directory": 1} if split == "train" else {}
            rows.append({"identifier": f"{split}-{i}-0-0", "sentence": TEXTS[i], "label": ("True", "False")[i % 2],
                         **more})  # fmt: skip
            for side in (0, 1):
                below = "images/train/1" if split == "train" else split
                picture(root / below / f"{split}-{i}-0-img{side}.png", "PNG")
        write(root / f"data/{split}.json", tuple(rows))


def scienceqa(root: Path, name: str) -> None:
    problems, splits = {}, {}
    for k, split in enumerate(SPLITS):
        splits[split] = [str(10 * k + i) for i in range(EACH)]
        for i, number in enumerate(splits[split]):
            problems[number] = {
                "question": "what is it ?", "choices": ["dog", "cat"], "answer": i % 2, "hint": "Look." if i else "",
                "image": "image.png" if i % 2 else None, "split": split, "subject": "natural science",
                "grade": f"grade{i + 3}",
            }  # fmt: skip
            if i % 2:
                picture(root / f"images/{split}/{number}/image.png", "PNG")
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", splits)


def msrvtt(root: Path, name: str) -> None:
    names = [f"video{i}" for i in range(2 * EACH)]
    for video in names:
        official.film(root / "videos" / f"{video}.mp4", ["red", "green"])
    told = [{"video_id": v, "caption": TEXTS[i % 6], "sen_id": i} for i, v in enumerate(names)]
    write(root / "MSRVTT_data.json", {"videos": [{"video_id": v} for v in names], "sentences": told})
    write(root / "MSRVTT_train.9k.csv", "\n".join(["video_id", *names[:EACH]]) + "\n")
    rows = [f"ret{i},msr{i},{v},{TEXTS[i]}" for i, v in enumerate(names[EACH:])]
    write(root / "MSRVTT_JSFUSION_test.csv", "\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n")


def msvd(root: Path, name: str) -> None:
    told = {}
    for split in SPLITS:
        names = [f"{split}_{i}_9" for i in range(EACH)]
        for i, video in enumerate(names):
            official.film(root / "clips" / f"{video}.avi", ["red", "blue"])
            told[video] = [TEXTS[i].split(), ["is", "it", *TEXTS[i].split()]]
        write(root / f"{split}_list.txt", "\n".join(names) + "\n")
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(told, protocol=0))


def referring(root: Path, name: str) -> None:
    file = "COCO_train2014_000000000007.jpg"
    official.picture(root / "train2014" / file)
    for split in ("train", "val", "testA", "testB", "test"):
        write(root / f"finetune_{name}_{split}.json", {
            "images": [{"id": i, "original_id": 7, "file_name": file, "width": 40, "height": 30, "caption": TEXTS[i],
                        "dataset_name": name} for i in range(EACH)],
            "annotations": [{"id": i, "image_id": i, "bbox": [1.0 + i, 2.0, 20.0, 15.0], "area": 300.0,
                             "original_id": 5, "tokens_positive": [[0, len(TEXTS[i])]]} for i in range(EACH)],
        })  # fmt: skip


def cc3m(root: Path, name: str) -> None:
    for i in range(2 * EACH):
        official.picture(root / "images" / "cc3m" / f"{i}.jpg", colour=list(official.COLOURS)[i % 4])
    listed = [{"image": f"{i}.jpg", "caption": TEXTS[i % 6], "dataset": "cc3m"} for i in range(2 * EACH)]
    write(root / "cc3m_pretrain.json", listed)


def visual_genome(root: Path, name: str) -> None:
    rows = []
    for i in range(EACH):
        official.picture(root / "images" / f"{i}.jpg")
        rows.append({"image": f"{i}.jpg", "caption": TEXTS[:2], "bb": [[0, 0, 20, 20], [5, 5, 20, 20]]})
    write(root / "vg_pretrain.json", rows)


def cifar(root: Path, name: str) -> None:
    labels = list(range(10))
    if name == "cifar10":
        for i in range(1, 6):
            official.cifar_batch(root / f"data_batch_{i}", labels[: EACH // 2])
        official.cifar_batch(root / "test_batch", labels[:EACH])
        (root / "batches.meta").write_bytes(official.python2({"label_names": [f"c{i}" for i in labels]}))
        return
    for split in ("train", "test"):
        official.cifar_batch(root / split, labels[:EACH], column="fine_labels", coarse_labels=[0] * EACH)
    names = {b"fine_label_names": [b"c%d" % i for i in labels], b"coarse_label_names": [b"all"]}
    (root / "meta").write_bytes(pickle.dumps(names, protocol=3))


def flowers(root: Path, name: str) -> None:
    from scipy import io

    for i in range(1, 3 * EACH + 1):
        official.picture(root / "jpg" / f"image_{i:05d}.jpg")
    ids = np.arange(1, 3 * EACH + 1, dtype=np.uint16).reshape(3, 1, EACH)
    io.savemat(root / "setid.mat", dict(zip(("trnid", "valid", "tstid"), ids, strict=True)))
    io.savemat(root / "imagelabels.mat", {"labels": np.uint8([[1 + i % 102 for i in range(3 * EACH)]])})


def folders(root: Path, name: str) -> None:
    for split in ("train", "test", "validation"):
        for i in range(EACH):
            official.picture(root / split / ("dog", "cat")[i % 2] / f"{i}.jpg")


MAKERS: dict[str, Callable[[Path, str], None]] = {
    "flickr30k": captioned, "coco": captioned, "vqav2": vqav2, "gqa": gqa, "nlvr2": nlvr2, "scienceqa": scienceqa,
    "msr-vtt": msrvtt, "msvd": msvd, "refcoco": referring, "refcoco+": referring, "refcocog": referring, "cc3m": cc3m,
    "visual-genome": visual_genome, "cifar10": cifar, "cifar100": cifar, "flowers102": flowers, "imagefolder": folders,
}  # fmt: skip


def stand_in(data: dict[str, Any], root: Path) -> dict[str, Any]:
    """The data section of a recipe on a stand-in below `root`, made at the first call."""
    name = data["name"]
    place = root / name
    if not place.exists():
        place.mkdir(parents=True)
        MAKERS[name](place, name)
    few: dict[str, Any] = {"cc3m": {"validation": EACH}, "visual-genome": {"validation": 1}}.get(name, {})
    return {**data, "root": str(place), **few}

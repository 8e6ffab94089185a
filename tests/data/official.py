"""Small data sets in the layouts of their authors, made in a folder for the tests of the readers."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "white": (240, 240, 240)}


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red", form: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path, form)
    return path


def jpeg(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), COLOURS[colour]).save(buffer, "JPEG")
    return buffer.getvalue()


def ref(number: int, split: str, sentences: list[str], image_id: int = 7, ann_id: int | None = None) -> dict[str, Any]:
    """A ref as REFER's pickles have it; its picture's name carries the annotation."""
    ann_id = 100 + number if ann_id is None else ann_id
    return {
        "ref_id": number, "ann_id": ann_id, "image_id": image_id, "category_id": 1, "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg", "sent_ids": list(range(len(sentences))),
        "sentences": [{"sent": s, "raw": s, "tokens": s.split(), "sent_id": 10 * number + i}
                      for i, s in enumerate(sentences)],
    }  # fmt: skip


def refer(root: Path, refs: list[dict[str, Any]], boxes: dict[int, list[float]]) -> Path:
    """REFER's layout of RefCOCO: one picture of 40 x 30 pixels; `boxes` by annotation."""
    name = "COCO_train2014_000000000007.jpg"
    picture(root / "train2014" / name)
    folder = root / "refcoco"
    folder.mkdir(exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": name, "width": 40, "height": 30}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 1, "bbox": b} for i, b in boxes.items()],
        "categories": [{"id": 1, "name": "dog"}],
    }))  # fmt: skip
    return root


def cifar_batch(path: Path, labels: list[int], seed: int = 0, column: str = "labels", **more: Any) -> np.ndarray:
    """A batch file as Python 2 wrote it: string opcodes, and numpy's old module name. Returns its rows of bytes."""
    rows = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(python2({"data": rows, column: labels, **more}))
    return rows


def python2(values: dict[str, Any]) -> bytes:
    """A dictionary of lists of numbers or strings, and of arrays of bytes, in the opcodes of Python 2's pickles."""
    out = b"\x80\x02}("
    for key, value in values.items():
        out += _string(key.encode()) + (_array(value) if isinstance(value, np.ndarray) else _list(value))
    return out + b"u."


def _list(values: list[Any]) -> bytes:
    items = (_string(v.encode()) if isinstance(v, str) else b"J" + int(v).to_bytes(4, "little") for v in values)
    return b"](" + b"".join(items) + b"e"


def _string(value: bytes) -> bytes:
    return b"T" + len(value).to_bytes(4, "little") + value


def _array(value: np.ndarray) -> bytes:
    shape = b"".join(b"J" + n.to_bytes(4, "little") for n in value.shape)
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + _string(b"b") + b"tR"
    kind = (b"cnumpy\ndtype\n(" + _string(b"u1") + b"K\x00K\x01tR(K\x03" + _string(b"|")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")  # fmt: skip
    return start + b"(K\x01(" + shape + b"t" + kind + b"I00\n" + _string(value.tobytes()) + b"tb"


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar file with the members of each sample one after the other, in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, parts in samples.items():
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def film(path: Path, colours: list[str], fps: int = 4, codec: str = "mpeg4") -> Path:
    """A video of 32 x 32 pixels with one plain colour a frame."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), COLOURS[colour]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

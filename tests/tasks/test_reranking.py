"""Cross-encoders that retrieve: candidates, the order among them, wrong captions in training."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from torch import nn

import trimtab
from tests.models.official import converted, file, meter, rows
from trimtab.backbones.family import FAMILIES
from trimtab.contrast import hard_pairs
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run
from trimtab.metrics import retrieval as measured
from trimtab.tasks import TaskModel
from trimtab.tasks.reranking import Reranking

COLOURS = ["red", "green", "blue", "white", "black"]
CAPTIONS = [["a red dog", "two cats"], ["a cat"], ["an apple", "a dog", "two dogs"], ["a red apple"], ["two red cats"]]
OWNER = [0, 0, 1, 2, 2, 2, 3, 4]


@pytest.fixture(scope="module")
def table():
    cells = [{"path": None, "bytes": _png(c)} for c in COLOURS]
    schema = Features({"image": Image(), "captions": List(Value("string"))})
    return Dataset.from_dict({"image": cells, "captions": CAPTIONS}, features=schema)


def _png(colour: str) -> bytes:
    import io

    out = io.BytesIO()
    Pictures.new("RGB", (30, 20), colour).save(out, "png")
    return out.getvalue()


@pytest.fixture(scope="module", params=["blip", "xvlm"])
def backbone(request, tmp_path_factory):
    path, settings, words = file(tmp_path_factory.mktemp("files"), request.param)
    torch.manual_seed(0)
    loaded = trimtab.load(path, tokenizer=words, task="pretrain", **settings).eval()
    with torch.no_grad():  # fresh weights hardly tell one picture from another
        for p in (loaded.model.vision_proj, loaded.model.text_proj):
            p.weight.normal_()
    return loaded


def scored(backbone, table, **settings):
    task = Reranking(**settings)
    with torch.inference_mode():
        batches = [task.collate(backbone, [table[i] for i in part], train=False) for part in ((0, 1, 2), (3, 4))]
        records = [r for batch in batches for r in task.predict(backbone, nn.Identity(), batch)]
        return task.score(backbone, nn.Identity(), records, table), records, task


@torch.inference_mode()
def by_hand(backbone, table):
    """Scores as the authors compute them, one pair at a time (N, M), and cosines."""
    texts = [c for captions in CAPTIONS for c in captions]
    seen = [backbone.look(backbone.images([row["image"]])["pixel_values"]) for row in table]
    words = [backbone.texts([t]) for t in texts]
    image = torch.cat([backbone.image_vector(s) for s in seen])
    text = torch.cat([backbone.text_vector(w["input_ids"], w["attention_mask"]) for w in words])
    cosines = image @ text.T
    scores = torch.empty(len(seen), len(texts))
    for i, s in enumerate(seen):
        for j, w in enumerate(words):
            fused = backbone.fuse(s, w["input_ids"], w["attention_mask"])
            scores[i, j] = backbone.model.itm_head(fused.tokens[:, 0])[0, 1]
    return scores + cosines if "Blip" in type(backbone.model).__name__ else scores, cosines


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("pairs", [1, 256])
def test_candidates_are_ordered_as_the_authors_do(backbone, table, k, pairs):
    scores, cosines = by_hand(backbone, table)
    images, texts = torch.full(scores.shape, -100.0), torch.full(scores.T.shape, -100.0)
    for i, row in enumerate(cosines):
        chosen = row.topk(k).indices
        images[i, chosen] = scores[i, chosen]
    for j, column in enumerate(cosines.T):
        chosen = column.topk(k).indices
        texts[j, chosen] = scores.T[j, chosen]
    wanted = measured.both_ways(measured.ranks(images, OWNER, texts))
    found, records, task = scored(backbone, table, k=k, pairs=pairs)
    assert found["rsum"] == pytest.approx(wanted["rsum"])
    assert found["image to text recall@1"] == pytest.approx(wanted["i2t"]["R@1"] / 100)
    assert found["text to image mean rank"] == pytest.approx(wanted["t2i"]["meanr"])
    assert [r["best"] for r in records] == images.argmax(dim=1).tolist()
    own = [s for r in records for s in r["scores"]]
    assert own == pytest.approx([float(scores[i, j]) for j, i in enumerate(OWNER)], abs=1e-4)
    entry = task.gallery(records, table, [2])[0]
    assert entry["target"] == "an apple" and entry["correct"] == (OWNER[records[2]["best"]] == 2)


def test_as_many_candidates_as_there_are_is_no_choice(backbone, table):
    everything, *_ = scored(backbone, table, k=99)
    scores, _ = by_hand(backbone, table)
    wanted = measured.both_ways(measured.ranks(scores, OWNER))
    assert everything["rsum"] == pytest.approx(wanted["rsum"])
    assert everything["image to text mean rank"] == pytest.approx(wanted["i2t"]["meanr"])


def test_hard_negatives_are_drawn_by_similarity_and_never_the_own():
    similar = torch.full((4, 4), -50.0)
    similar[0, 2] = similar[1, 0] = similar[2, 3] = similar[3, 1] = 0
    similar.fill_diagonal_(5.0)
    texts, images = hard_pairs(similar)
    assert texts.tolist() == [2, 0, 3, 1] and images.tolist() == [1, 3, 0, 2]
    with pytest.raises(ValueError, match="give two pairs or more"):
        hard_pairs(torch.zeros(1, 1))


def test_the_contrastive_objective_teaches(backbone, table):
    task = Reranking(objective="contrast", k=2)
    task.check(backbone, table)
    model = TaskModel(backbone, task)
    batch = task.collate(backbone, list(table), train=True)
    assert {n: v.shape[0] for n, v in batch.items()} == dict.fromkeys(batch, 5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        torch.manual_seed(0)  # the same wrong pairs, while similarities change little
        loss = model(**batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    assert losses[-1] < 0.9 * losses[0], losses
    assert "temp" in " ".join(n for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["vilt", "meter"])
def test_ranking_scores_the_own_caption_against_others(family, table, tmp_path):
    if family == "vilt":
        path, settings, words = file(tmp_path, "vilt")
        whole = trimtab.load(path, tokenizer=words, task="irtr", **settings)
    else:
        _, _, words = file(tmp_path, "meter")
        whole = FAMILIES["meter"].backbone("meter", meter("mlm", "itm", tasks=("itm", "irtr"))[0], None)
        from transformers import AutoTokenizer

        whole.adopt(AutoTokenizer.from_pretrained(words))
    torch.manual_seed(0)
    with torch.no_grad():  # fresh weights hardly tell one text from another
        for parameter in whole.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    task = Reranking(negatives=3)
    task.check(whole, table)
    model = TaskModel(whole, task).eval()
    rows_ = list(table)
    batch = task.collate(whole, rows_, train=True)
    assert batch["input_ids"].shape[:2] == (5, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(**batch)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses
    found, records, _ = scored(whole.eval(), table, pairs=7)
    assert 0 <= found["recall@1"] <= 1 and "best" in records[0]
    assert model.answer([{"image": rows_[0]["image"], "captions": ["a cat", "a dog"]}])[0]["scores"]


def test_wrong_captions_are_others_and_none_twice_while_there_are_enough():
    rows_ = [{"captions": c} for c in CAPTIONS]
    for i, row in enumerate(rows_):
        for n in (2, 5, 15):
            wrong = Reranking(negatives=n)._wrong(rows_, i)
            assert len(wrong) == n and not set(wrong) & set(row["captions"])
            assert n > 5 or len(set(wrong)) == n
    with pytest.raises(ValueError, match="take a larger batch"):
        Reranking()._wrong(rows_[:1], 0)


def test_a_run_reranks_and_answers(tmp_path):
    data = str(rows(tmp_path / "data"))
    raw = {
        "backbone": str(converted(tmp_path, "xvlm", task="retrieval")),
        "task": {"name": "reranking", "objective": "contrast", "k": 4}, "methods": ["full"],
        "data": {"name": "files", "train": data, "test": data},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-4, "evaluation_batch": 6},
    }  # fmt: skip
    folder = run.run(recipe.expand(raw, "reranking")[0], tmp_path / "run")
    test = json.loads((folder / "metrics.json").read_text())["test"]
    assert {"recall@1", "rsum", "text to image median rank"} <= test.keys()
    assert json.loads((folder / "costs.json").read_text())["macs"] > 0
    assert len(json.loads((folder / "samples" / "samples.json").read_text())) == 8
    answer = folder_of_runs.load(folder).answer(
        [{"image": Pictures.new("RGB", (9, 9)), "captions": ["a dog", "a cat"]}]
    )
    assert len(answer[0]["scores"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"objective": "hinge"}, "must be one of rank, contrast"), ({"k": -1}, "k must be at least 0"),
     ({"k": 5, "folds": 2}, "leave out `folds`")],
)  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Reranking(**settings)


def test_a_model_without_vectors_gets_no_candidates(table, tmp_path):
    path, settings, words = file(tmp_path, "vilt")
    vilt = trimtab.load(path, tokenizer=words, task="irtr", **settings)
    with pytest.raises(ValueError, match=r"no vectors of pictures and texts to compare.*BLIP or X-VLM"):
        Reranking(k=2).check(vilt, table)
    with pytest.raises(ValueError, match="needs a joint backbone"):
        Reranking().check(SimpleNamespace(kind="dual", name="mine"), table)

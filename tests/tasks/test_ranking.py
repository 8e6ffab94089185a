"""Questions answered by ranking a list with the model's own decoder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import trimtab
from tests.models.official import converted, file, rows
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run
from trimtab.tasks import TaskModel
from trimtab.tasks.ranking import AnswerRanking, weighted

LIST = ["a dog", "two cats", "yes", "a red apple", "no", "a cat"]
ROWS = [
    {"image": Image.new("RGB", (30, 20), c), "question": q, "answer": a[0], "answers": a}
    for c, q, a in [
        ("red", "is it a dog", ["yes", "yes", "a dog", "yes"]), ("blue", "is it a cat", ["no", "no", "no", "no"]),
        ("green", "is it two red cats", ["two cats", "two cats", "two", "two"]),
    ]
]  # fmt: skip


@pytest.fixture(scope="module", params=["blip", "xvlm"])
def backbone(request, tmp_path_factory):
    path, settings, words = file(tmp_path_factory.mktemp("files"), request.param)
    return trimtab.load(path, tokenizer=words, task="vqa", **settings).eval()


@torch.inference_mode()
def word_logits(backbone, tokens, mask, ids, answer_mask):
    """Logits of an answer's words by the plain model, (N, A - 1, V)."""
    if "Blip" in type(backbone.model).__name__:
        out = backbone.model.text_decoder(input_ids=ids, attention_mask=answer_mask, encoder_hidden_states=tokens,
                                          encoder_attention_mask=mask).logits  # fmt: skip
    else:
        out = backbone.model.answer_words(tokens, mask, ids, answer_mask)
    return out[:, :-1]


@torch.inference_mode()
def by_hand(backbone, row, k):
    """The best answer of one question as the authors choose it, every answer by itself."""
    batch = {**backbone.images([row["image"]]), **backbone.texts([row["question"]])}
    tokens = backbone.pair(**batch).tokens
    whole, first = [], []
    for answer in LIST:
        told = backbone.answers([answer])
        ids = told["input_ids"]
        logits = word_logits(backbone, tokens, batch["attention_mask"], ids, told["attention_mask"])[0]
        smoothing = 0.1 if "Blip" in type(backbone.model).__name__ else 0.0
        whole.append(-float(F.cross_entropy(logits, ids[0, 1:], reduction="sum", label_smoothing=smoothing)))
        first.append(float(logits[0].log_softmax(dim=-1)[ids[0, 1]]))
    chosen = torch.tensor(first).topk(k).indices.tolist()
    twice = 0 if "Blip" in type(backbone.model).__name__ else 1  # X-VLM counts the first word again
    return LIST[max(chosen, key=lambda i: whole[i] + twice * first[i])]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_the_best_answer_is_the_authors(backbone, k):
    task = AnswerRanking(LIST, k=k, pairs=4)
    told = [r["answer"] for r in TaskModel(backbone, task).answer(ROWS)]
    assert told == [by_hand(backbone, row, k) for row in ROWS]


def test_answers_count_with_their_weights(backbone):
    task = AnswerRanking(LIST)
    batch = task.collate(backbone, ROWS, train=True)
    assert batch["answer_weights"].tolist() == [[0.75, 0.25], [1, 0], [0.5, 0.5]]
    with torch.inference_mode():
        found = float(TaskModel(backbone, task).eval()(**batch)["loss"])
        wanted = 0.0
        for row in ROWS:
            single = {**backbone.images([row["image"]]), **backbone.texts([row["question"]])}
            tokens = backbone.pair(**single).tokens
            for answer, weight in weighted(row).items():
                told = backbone.answers([answer])
                loss = backbone.answer_loss(tokens, single["attention_mask"], told["input_ids"], told["attention_mask"])
                wanted += weight * float(loss) / len(ROWS)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_weights_of_a_row():
    assert weighted({"answer": "yes", "answers": ["yes", "no", "yes", "yes"]}) == {"yes": 0.75, "no": 0.25}
    assert weighted({"answer": "yes"}) == {"yes": 1.0} and weighted({"answer": ""}) == {}
    assert weighted({"answer": "dog", "answers": ["dog"], "weights": [0.5]}) == {"dog": 0.5}
    with pytest.raises(ValueError, match="found 1 weights and 2 answers"):
        weighted({"answer": "dog", "answers": ["dog", "cat"], "weights": [0.5]})


def test_a_batch_without_answers_teaches_nothing(backbone):
    task = AnswerRanking(LIST)
    blank = [{**row, "answer": "", "answers": []} for row in ROWS]
    assert float(task.loss(backbone, None, task.collate(backbone, blank, train=True))) == 0


@pytest.mark.parametrize("family", ["blip", "xvlm"])
def test_it_trains_from_a_recipe_and_answers_from_the_run(family, tmp_path):
    data = str(rows(tmp_path / "data"))
    raw = {
        "backbone": str(converted(tmp_path, family, task="vqa")), "task": {"name": "answer-ranking", "k": 2},
        "data": {"name": "files", "train": data, "test": data}, "methods": [{"name": "omp", "sparsity": 0.5}, "full"],
        "training": {"steps": 12, "batch_size": 4, "learning_rate": 5e-3, "evaluation_batch": 6},
    }  # fmt: skip
    folder = run.run(recipe.expand(raw, "ranking")[0], tmp_path / "run", measure_costs=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]
    told = folder_of_runs.load(folder).answer([{"image": Image.new("RGB", (9, 9)), "question": "is it a dog"}])
    assert told[0]["answer"] in ("yes", "no", "two")


def test_a_model_without_a_decoder_of_answers_is_refused(tmp_path):
    path, settings, words = file(tmp_path, "blip")
    blip = trimtab.load(path, tokenizer=words, task="pretrain", **settings)
    table = SimpleNamespace(column_names=["image", "question", "answer"])
    with pytest.raises(ValueError, match=r"no decoder of answers: a BLIP or X-VLM with task='vqa' has one"):
        AnswerRanking(LIST).check(blip, table)
    with pytest.raises(ValueError, match="stand there twice, such as 'yes'"):
        AnswerRanking(["yes", "no", "yes"])
    with pytest.raises(ValueError, match="expected k >= 1"):
        AnswerRanking(LIST, k=0)

"""Image pairs, entailment and regressed boxes: what is computed, against the models' own heads and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from tests.tasks.parts import stub
from tests.tasks.tiny import BACKBONES, meter, picture, table, vilt
from trimtab.backbones.pictures import pixel_mask
from trimtab.tasks import TASKS, TaskModel
from trimtab.tasks.labelled import own_or
from trimtab.tasks.pairs import Pairs, swapped


def pair_batch(backbone) -> tuple[TaskModel, dict]:
    torch.manual_seed(0)
    model = TaskModel(backbone, Pairs()).eval()
    return model, model.task.collate(backbone, list(table("pairs")), train=False)


def official(name: str, model: nn.Module, b: dict) -> torch.Tensor:
    """Logits of the model's own forward pass for NLVR2."""
    words = (b["input_ids"], b["attention_mask"])
    first, second = b["pixel_values"], b["second_pixel_values"]
    if name == "meter":
        return model.nlvr2(first, second, *words)
    if name == "blip pairs":
        return model(first, second, *words)
    if name == "xvlm pairs":
        return model(first, *words, second_image=second)["classes"]
    both, mask = torch.stack([first, second], dim=1), torch.stack([pixel_mask(first), pixel_mask(second)], dim=1)
    return model(input_ids=words[0], attention_mask=words[1], pixel_values=both, pixel_mask=mask).logits


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("meter", lambda: meter(nlvr2=2)), ("vilt", lambda: vilt(hf.ViltForImagesAndTextClassification, 3)),
     ("blip pairs", BACKBONES["blip pairs"]), ("xvlm pairs", BACKBONES["xvlm pairs"])],
)  # fmt: skip
def test_a_pair_is_judged_as_by_the_models_own_forward_pass(name, backbone):
    model, batch = pair_batch(backbone())
    plain = model.backbone.model
    with torch.no_grad():
        for parameter in plain.parameters():  # so that both pictures, and the types of their tokens, matter
            parameter += 0.1 * torch.randn_like(parameter)
        model.head = Pairs().head(model.backbone)
        mine = model.task.logits(model.backbone, model.head, batch)
        assert torch.allclose(mine, official(name, plain, batch), atol=1e-5)
        swapped = {**batch, "pixel_values": batch["second_pixel_values"], "second_pixel_values": batch["pixel_values"]}
        assert not torch.allclose(mine, model.task.logits(model.backbone, model.head, swapped), atol=1e-4)
        # The head is a copy, which is put back when the model is exported.
        for parameter in model.head.parameters():
            parameter.zero_()
        assert official(name, plain, batch).abs().sum() > 0
        model.task.fold(model.backbone, model.head)
        assert official(name, plain, batch).abs().sum() == 0


@pytest.mark.parametrize(
    ("make", "three"), [(meter, lambda: meter(nlvr2=2)), (vilt, lambda: vilt(types=3))], ids=["meter", "vilt"]
)
def test_the_second_picture_has_a_type_of_its_own_where_the_model_has_one(make, three):
    for backbone, rows in ((make(), 2), (three(), 3)):
        batch = pair_batch(backbone)[1]
        words = (batch["input_ids"], batch["attention_mask"])
        with torch.no_grad():
            types = next(p for n, p in backbone.model.named_parameters() if n.endswith("token_type_embeddings.weight")
                         and "text" not in n)  # fmt: skip
            assert len(types) == rows
            types[-1] += 1.0
            found = backbone.pair_of(batch["pixel_values"], batch["pixel_values"], *words).pooled
        first, second = found.chunk(2, dim=-1)
        assert found.shape[1] == backbone.pair_width == 2 * backbone.width
        assert torch.allclose(first, second, atol=1e-6) == (rows == 2)


def test_consistency_is_of_sentences_and_the_number_of_pictures_is_two():
    rows, task = table("pairs"), Pairs()
    labels = list(rows["label"])
    records = [{"label": label} for label in labels]
    assert task.score(None, None, records, rows) == {"accuracy": 1, "consistency": 1}
    records[0] = {"label": "true" if labels[0] == "false" else "false"}  # one of three sentences, one of six pairs
    found = task.score(None, None, records, rows)
    assert found == {"accuracy": pytest.approx(5 / 6), "consistency": pytest.approx(2 / 3)}
    own = rows.remove_columns("identifier").add_column("identifier", [str(i) for i in range(6)])
    assert task.score(None, None, records, own) == {"accuracy": pytest.approx(5 / 6)}
    twice = rows.remove_columns("identifier").add_column("identifier", ["dev-1-0-0"] * 6)
    with pytest.raises(ValueError, match="expected each identifier once, found 'dev-1-0-0'"):
        task.score(None, None, records, twice)
    with pytest.raises(ValueError, match="compares two pictures, a row has 3: 'dev-1-0-0'"):
        task.collate(stub(), [{**rows[0], "images": [picture("red")] * 3}], True)


def test_pictures_and_sides_are_swapped_together_in_training_alone():
    row = {"images": [picture("red"), picture("blue")], "statement": "Left of it: upright, the left is not right.",
           "label": "true"}  # fmt: skip
    other = swapped(row)
    assert other["statement"] == "Right of it: upright, the right is not left." and swapped(other) == row
    assert other["images"] == row["images"][::-1] and other["label"] == "true"
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    for train in seen:
        for _ in range(20):
            backbone = stub()
            Pairs(swap=True).collate(backbone, [row], train)
            seen[train].add(backbone.heard[0][:5])
    assert seen == {True: {"Left ", "Right"}, False: {"Left "}}
    backbone = stub()
    Pairs().collate(backbone, [row] * 20, True)
    assert set(backbone.heard) == {row["statement"]}


def test_entailment_reads_the_premise_if_asked():
    row = {**table("entailment")[0], "premise": "a photo"}
    for settings, heard in (({}, "it is red"), ({"premise": True}, "a photo [SEP] it is red")):
        backbone = stub(tokenizer=SimpleNamespace(sep_token="[SEP]"))
        TASKS["entailment"](**settings).collate(backbone, [row], True)
        assert backbone.heard == [heard]
    assert TASKS["entailment"](premise=True).columns == ("premise", "statement", "label")
    assert TASKS["entailment"].columns == ("statement", "label")


def test_own_heads_are_taken_and_a_wrong_number_of_outputs_is_named():
    backbone = meter(snli=3)
    head = TASKS["entailment"]().head(backbone)
    own = backbone.model.snli_classifier
    assert all(torch.equal(a, b) and a is not b for a, b in zip(head.parameters(), own.parameters(), strict=True))
    with pytest.raises(ValueError, match="task 'entailment' asks for 3 outputs, the head of 'meter' has 4"):
        own_or(meter(snli=4), "entailment", 3, nn.Identity())


def test_regressed_boxes_are_those_of_xvlm_and_cost_what_it_asks():
    torch.manual_seed(0)
    model = TaskModel(BACKBONES["xvlm"](), TASKS["box-regression"]()).eval()
    batch = model.task.collate(model.backbone, list(table("grounding")), train=True)
    with torch.no_grad():
        plain = model.backbone.model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])["boxes"]
        corners, centres = model.task._boxes(model.backbone, model.head, batch)
        assert torch.allclose(centres, plain, atol=1e-6)
        loss = model(**batch)["loss"].item()
    # X-VLM's `get_bbox_loss`, box by box.
    total = 0.0
    for (x, y, w, h), mine, target in zip(plain.tolist(), corners.tolist(), batch["boxes"].tolist(), strict=True):
        assert mine == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-6)
        left, top, right, bottom = target
        sides = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        total += sum(abs(a - b) for a, b in zip((x, y, w, h), sides, strict=True))
        across = max(0, min(mine[2], right) - max(mine[0], left))
        down = max(0, min(mine[3], bottom) - max(mine[1], top))
        union = w * h + sides[2] * sides[3] - across * down
        hull = (max(mine[2], right) - min(mine[0], left)) * (max(mine[3], bottom) - min(mine[1], top))
        total += 1 - (across * down / union - (hull - union) / hull)
    assert loss == pytest.approx(total / len(plain), abs=1e-4)

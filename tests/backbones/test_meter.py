"""METER from files in its authors' layout. What it computes is compared with their code in `test_golden.py`."""

from __future__ import annotations

import pytest
import torch

import trimtab
from tests.models import layouts
from tests.models.official import METER_HEADS as HEADS
from tests.models.official import meter as tiny
from trimtab.anatomy import Anatomy
from trimtab.backbones import load_model, load_official
from trimtab.backbones.family import FAMILIES
from trimtab.backbones.official import FORMATS, CheckpointError, Tensors, build_official
from trimtab.cli import main
from trimtab.counting import count_macs
from trimtab.methods import METHODS


def real(*tasks: str, **settings) -> torch.nn.Module:
    """At published sizes, without memory for weights."""
    state = layouts.fill(layouts.meter(tasks), device="meta")
    kind, config = FORMATS["meter"].plan(Tensors(state, "meter.ckpt", "METER"), {}, **settings)
    with torch.device("meta"):
        return kind(config).eval()


def batch(size: int = 2, pixels: int = 16, length: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(size, length, dtype=torch.long)
    mask[0, 4:] = 0
    return {
        "pixel_values": torch.randn(size, 3, pixels, pixels, generator=generator),
        "input_ids": torch.randint(4, 40, (size, length), generator=generator).masked_fill(mask == 0, 1),
        "attention_mask": mask,
    }


def test_all_that_the_authors_code_uses_is_used():
    model, report = tiny()
    assert not report.unused and not report.fresh and len(model.vision.encoder.layers) == 2
    assert {k.split(".")[0] for k in report.leftovers} == {"vit_model", "text_transformer"}
    assert len(report.leftovers) == 3 + 2 + 1  # CLIP's text positions and norm, RoBERTa's pooler, an index
    out = model(**batch())
    assert out.text.shape == (2, 6, 16) and out.image.shape == (2, 5, 16) and out.pooled.shape == (2, 32)


def test_padding_changes_nothing():
    model, _ = tiny()
    whole = batch()
    short = {k: v[:1, :4] if k != "pixel_values" else v[:1] for k, v in whole.items()}
    with torch.no_grad():
        assert torch.allclose(model(**whole).pooled[0], model(**short).pooled[0], atol=1e-6)


def test_both_streams_read_each_other_as_they_were():
    """The image layer must see the text before the text layer changed it: skipping one stream's layer is then enough
    to know what the other reads."""
    model, _ = tiny()
    seen = {}
    for name in ("text", "image"):
        layer = getattr(model, f"cross_modal_{name}_layers")[0]
        layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args, out)}))
    with torch.no_grad():
        model(**batch())
    (text_in, *_), _ = seen["text"]
    (_, image_reads, *_), _ = seen["image"]
    assert torch.equal(image_reads, text_in)


def test_attention_implementations_agree():
    model, _ = tiny()
    with torch.no_grad():
        fused = model(**batch()).pooled
        model.set_attn_implementation("eager")
        assert model.config.cross_config._attn_implementation == "eager"
        assert torch.allclose(model(**batch()).pooled, fused, atol=1e-5)


def test_gradients_reach_every_parameter():
    model, _ = tiny("mlm", "itm", "vqa", "snli", "irtr")
    out = model.train()(**batch())
    heads = (model.itm_score, model.vqa_classifier, model.snli_classifier, model.rank_output)
    (sum(head(out.pooled).square().sum() for head in heads) + model.mlm_score(out.text).square().sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_saved_and_read_again_bit_for_bit(tmp_path):
    model, _ = tiny("vqa")
    trimtab.save_pretrained(model, tmp_path / "dense", sparse=False)
    trimtab.save_pretrained(model, tmp_path / "sparse")
    for name in ("dense", "sparse"):
        again = trimtab.from_pretrained(tmp_path / name)
        assert type(again).__name__ == "MeterModel"
        with torch.no_grad():
            for found, wanted in zip(again(**batch()).to_tuple(), model(**batch()).to_tuple(), strict=True):
                assert torch.equal(found, wanted)
    assert trimtab.load(tmp_path / "dense").model.config.tasks == {"vqa": 7}


def test_converted_on_the_command_line(tmp_path, capsys):
    """With a width of 64, of which the number of heads is known."""
    sizes = layouts.TINY_METER | {"width": 64, "text_width": 64, "hidden": 64, "layers": 1}
    torch.save({"state_dict": layouts.fill(layouts.meter(("itm",), **sizes))}, tmp_path / "meter.ckpt")
    arguments = ["convert", str(tmp_path / "meter.ckpt"), str(tmp_path / "out"), "--image-size", "32"]
    assert main(arguments) == 0
    assert "METER" in (shown := capsys.readouterr().out) and "resized from (5, 64) to (17, 64)" in shown
    direct, _ = load_official(tmp_path / "meter.ckpt", image_size=32)
    wanted, found = direct.state_dict(), trimtab.from_pretrained(tmp_path / "out").state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert main(arguments) == 2 and "is there already" in capsys.readouterr().err
    arguments[-1], arguments[2] = "30", str(tmp_path / "other")
    assert main(arguments) == 2 and "no multiple of the patch" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "--to sparse or --to dense" in capsys.readouterr().err
    model, anatomy = load_model(tmp_path / "out")
    assert len(anatomy.towers) == 4 and next(model.parameters()).is_meta


def test_new_heads_start_as_the_authors_have_them():
    _, report = tiny("mlm", "itm", tasks=("vqa",), answers=5)
    assert report.fresh and all(n.startswith("vqa_classifier.") for n in report.fresh)
    ranking, report = tiny("mlm", "itm", tasks=("itm", "irtr"))
    assert not report.fresh
    assert torch.equal(ranking.rank_output.weight[0], ranking.itm_score.fc.weight[1])
    pairs, _ = tiny("mlm", "itm", tasks=("nlvr2",))
    table = pairs.token_type_embeddings.weight
    assert table.shape[0] == 3 and torch.equal(table[2], table[1])
    x = batch()
    assert pairs.nlvr2(x["pixel_values"], x["pixel_values"], x["input_ids"], x["attention_mask"]).shape == (2, 2)


def test_another_image_size():
    model, report = tiny(image_size=32)
    name = "vision.embeddings.position_embedding.weight"
    assert report.resized == {name: ((5, 16), (17, 16))}
    assert model(**batch(pixels=32)).image.shape == (2, 17, 16)
    with pytest.raises(CheckpointError, match="image_size 30 is no multiple of the patch of 8 pixels"):
        tiny(image_size=30)
    with pytest.raises(ValueError, match=r"picture of 32 x 32: METER was built for 16 x 16"):
        tiny()[0](**batch(pixels=32))


def test_text_that_is_too_long_and_other_bad_input():
    model, _ = tiny()
    with pytest.raises(ValueError, match="text of 13 tokens: METER has positions for 12"):
        model(**batch(length=13))
    with pytest.raises(CheckpointError, match="unknown task of METER 'vqq': did you mean 'vqa'"):
        tiny(tasks=("vqq",))
    state = layouts.fill(layouts.meter(**layouts.TINY_METER))
    with pytest.raises(CheckpointError, match="heads of a width of 16: set `vision_heads`"):
        build_official(state, {}, "meter.ckpt")
    half = {k: v for i, (k, v) in enumerate(state.items()) if i % 2 or not k.startswith(("cross_modal", "text_tr"))}
    half |= {k: v for k, v in state.items() if ".0.intermediate.dense.weight" in k or "embeddings" in k}
    with pytest.raises(
        CheckpointError, match=r"looks like METER, but \d+ of \d+ tensors are missing: '.*', '.*', '.*' and"
    ):
        build_official(half, {}, "meter.ckpt", **HEADS)
    state["cross_modal_text_layers.1.output.dense.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match=r"'cross_modal_text_layers.1.output.dense.weight' has \(3, 3\)"):
        build_official(state, {}, "meter.ckpt", **HEADS)


def test_anatomy():
    model, _ = tiny()
    anatomy = Anatomy.of(model)
    assert [(t.name, t.modality, len(t.blocks)) for t in anatomy.towers] == [
        ("vision", "vision", 2), ("text", "text", 2), ("fusion_text", "fusion", 2), ("fusion_image", "fusion", 2),
    ]  # fmt: skip
    assert anatomy.tower("fusion_text").memory == "fusion_image"
    paths = {w.path for w in anatomy.weights(model)}
    assert len(paths) == 2 * 6 + 2 * 6 + 2 * 2 * 10


@pytest.mark.parametrize("skip", [0, 2])
def test_das_on_the_fusion_layers(skip):
    model, _ = tiny()
    anatomy = Anatomy.of(model)
    model.requires_grad_(False)
    method = METHODS["das"](skip=skip, towers=("fusion_text", "fusion_image"), reduction=2)
    method.assume(model, anatomy)
    left = method.attach(model, anatomy)
    assert len(list(left.blocks())) == 8 - skip
    model(**batch()).pooled.sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("das_1" in n for n in trained)
    assert not any(n.startswith(("vision.", "text_transformer.", "cross_modal_text_transform")) for n in trained)


def test_tasks_read_what_is_as_wide_as_their_heads():
    from trimtab.tasks import TASKS, TaskModel

    model, _ = tiny()
    backbone = FAMILIES["meter"].backbone("meter.ckpt", model, None)
    backbone.limit_text(6)
    for task in (TASKS["vqa"](["a", "b"]), TASKS["grounding"](), TASKS["matching"]()):
        whole = TaskModel(backbone, task)
        whole(**whole.example(2))["loss"].backward()
        assert all(p.grad is not None for p in whole.head.parameters()), task.name


PARAMETERS = {  # published sizes: task -> parameters of the authors' model
    ("mlm", "itm"): 358530139, ("vqa",): 327200825, ("nlvr2",): 324008194, ("itm", "irtr"): 319479299,
    ("snli",): 321843203,
}  # fmt: skip
SIDES = {("vqa",): 576, ("itm", "irtr"): 384, ("snli",): 384}


@pytest.mark.parametrize("tasks", PARAMETERS, ids="-".join)
def test_published_number_of_parameters(tasks):
    """To the last one, but for what nobody uses: what is left of CLIP's text tower, and RoBERTa's pooler."""
    unused = 77 * 512 + 2 * 512 + 768 * 768 + 768
    model = real(*tasks, image_size=SIDES.get(tasks))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[tasks] - unused


def test_published_multiply_adds_and_adapters():
    """At 384 px and 40 tokens 93.12 G, as DAS counts; two text and two image layers less is -11.97 % (section 4.2)."""
    fusion = ("fusion_text", "fusion_image")
    plan = tuple(f"cross_modal_{s}_layers.{i}" for s in ("text", "image") for i in (4, 5))
    macs, adapters = [], []
    with torch.device("meta"):
        x = {"pixel_values": torch.zeros(1, 3, 384, 384), "input_ids": torch.zeros(1, 40, dtype=torch.long),
             "attention_mask": torch.ones(1, 40, dtype=torch.long)}  # fmt: skip
    for method in (None, METHODS["das"](skip=4, towers=fusion, plan=plan), METHODS["das"](skip=0, towers=fusion)):
        model = real("itm", "irtr", image_size=384)
        if method:
            anatomy = Anatomy.of(model)
            method.assume(model, anatomy)
            method.attach(model, anatomy)
            own = {n: p.numel() for n, p in model.named_parameters() if "das_" in n or "adapter" in n}
            adapters.append(sum(v for n, v in own.items() if ".norm." not in n))
        macs.append(count_macs(lambda m=model, x=x: m.rank_output(m(**x).pooled)))
    assert macs[0] == 186250254336 // 2 and round(macs[0] / 1e9, 2) == 93.13
    assert abs((macs[1] - macs[0]) / macs[0] + 0.1197) < 0.001
    assert [round(a / 1e6, 2) for a in adapters] == [5.33, 5.34]

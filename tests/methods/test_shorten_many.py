"""Shortening many architectures: each list of blocks works, or is refused with a reason; nothing is silently wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.models import many
from tests.models.many import DECODED, FRAMES, MANY
from trimtab.anatomy import AnatomyError
from trimtab.methods.skip import configs
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.shorten import shorten

# (model, list, number of the block): what the refusal says.
REFUSED: dict[tuple[str, str, int], str] = {
    ("jamba", "model.layers", 1): r"'model.layers.1'.class is JambaMambaDecoderLayer, and there JambaAttention",
    ("gpt2", "transformer.h", 1): r"'transformer.h.1.attn'.scaling is 0.11\d+, and there 0.17",
    ("gpt-neo", "transformer.h", 1): r"'transformer.h.0.attn'.attention_layers is \['global', 'local', 'global'",
    ("t5", "encoder.block", 1): r"does not generate with its cache \(IndexError",
    ("blip", "text_encoder.encoder.layer", 1): r"also decides 'text_decoder.bert.encoder.layer'.* out of both",
    ("blip", "text_decoder.bert.encoder.layer", 1): r"also decides 'text_encoder.encoder.layer'",
    ("blip-2", "qformer.encoder.layer", 1): r"'qformer.encoder.layer.1'.has_cross_attention is True, and there False",
    ("instructblip", "qformer.encoder.layer", 1): r"has_cross_attention is True, and there False",
    ("video-llava", "model.video_tower.encoder.layers", 1): r"also decides 'model.image_tower.encoder.layers'",
    ("video-llava", "model.image_tower.encoder.layers", 1): r"the example does not run 'model.image_tower",
    ("qwen3-vl", "model.visual.deepstack_merger_list", 1): r"a stream that keeps its shape, found \(8, 16\)",
    ("qwen3-vl", "model.language_model.layers", 1): r"adds features of the picture after each of its first 2",
    ("bridgetower", "bridgetower.vision_model.visual.transformer.resblocks", 1): r"does not run \(IndexError",
    ("bridgetower", "bridgetower.text_model.encoder.layer", 1): r"its 'logits' is another than with the blocks passed",
    ("bridgetower", "bridgetower.cross_modal_image_layers", 1): r"also decides 'bridgetower.cross_modal_image_link",
    ("bridgetower", "bridgetower.cross_modal_text_layers", 1): r"also decides 'bridgetower.cross_modal_image_layers'",
    ("yolos", "vit.encoder.layer", 1): r"mid_position_embeddings is \(3, 1, 8, 16\), and there \(2, 1, 8, 16\)",
    ("florence2", "model.vision_tower.convs", 1): r"a stream that keeps its shape, found \(2, 16, 2, 2\)",
    ("florence2", "model.vision_tower.blocks", 1): r"does not run 'model.vision_tower.blocks.1'",
    ("swin", "encoder.layers", 1): r"'encoder.layers.0.downsample.norm'.weight is \(32,\), and there missing",
    ("convnext", "encoder.stages", 1): r"a stream that keeps its shape, found \(2, 16, 2, 2\)",
    ("grounding-dino", "model.backbone.conv_encoder.model.swin.encoder.layers", 1): r"swin.encoder.layers' 1 blocks",
    ("grounding-dino", "model.decoder.layers", 1): r"the boxes are refined once after each decoder layer",
}  # fmt: skip
# Lists inside a block, and heads, which are no blocks of a tower.
INNER = re.compile(r"\.\d+\.|predictor|classifier|bbox_embed|proj|reference_points|altup")


def blocks_of(model: nn.Module) -> Iterator[str]:
    """Paths of the outermost lists of two or more modules with weights."""
    for path, module in model.named_modules():
        weighty = isinstance(module, nn.ModuleList) and len(module) > 1 and any(True for _ in module.parameters())
        if weighty and not INNER.search(path):
            yield path


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MANY[name].build().eval()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a model returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [t for item in items for t in tensors(item)]


def words(model: Any, example: dict[str, Any]) -> Tensor | None:
    """Two words that a model writes with its cache; None if it writes none from this example."""
    if not type(model).can_generate():
        return None
    given = {k: v.clone() for k, v in example.items() if k != "labels" and not k.startswith("decoder")}
    try:
        return model.generate(**given, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    except Exception:
        return None


def state(model: Any, example: dict[str, Any]) -> tuple[Any, ...]:
    """All that must be as before after a refusal."""
    modules = [(n, id(m), {k: repr(v) for k, v in vars(m).items() if type(v) in (int, bool, float, str, list)})
               for n, m in model.named_modules()]  # fmt: skip
    return modules, id(model.config), model.config.to_dict(), {n: id(p) for n, p in model.named_parameters()}


@torch.no_grad()
def check(model: Any, example: dict[str, Any], count: int, path: str, tmp_path: Any) -> None:
    """That a shortened model is what is read from its folder."""
    assert len(model.get_submodule(path)) == count - 1
    own = tensors(model(**{k: v.clone() for k, v in example.items()}))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
    theirs = tensors(again(**{k: v.clone() for k, v in example.items()}))
    assert len(own) == len(theirs) > 0
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(own, theirs, strict=True))
    if (wanted := words(model, example)) is not None:
        assert torch.equal(words(again, example), wanted)


@pytest.mark.parametrize("name", MANY)
def test_each_list_of_blocks_works_or_is_refused_by_name(name, tmp_path):
    example = MANY[name].example
    lists = list(blocks_of(built(name)))
    assert lists
    for i, path in enumerate(lists):
        model = built(name)
        count, weights = len(model.get_submodule(path)), {n: p.clone() for n, p in model.named_parameters()}
        if (why := REFUSED.get((name, path, 1))) is None:
            assert shorten(model, [f"{path}.1"], example) is model
            check(model, example, count, path, tmp_path / str(i))
            outside = {n: p for n, p in model.named_parameters() if not n.startswith(path) and n in weights}
            assert all(torch.equal(p, weights[n]) for n, p in outside.items() if p.shape == weights[n].shape)
            continue
        before = state(model, example)
        with pytest.raises(ValueError, match=why):
            shorten(model, [f"{path}.1"], example)
        assert state(model, example) == before


def test_every_refusal_that_is_pinned_is_of_a_list_that_is_there():
    paths = {name: set(blocks_of(built(name))) for name in {name for name, _, _ in REFUSED}}
    assert not [key for key in REFUSED if key[1] not in paths[key[0]]]


# --- what is read by number, and what two stacks share ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "key", "wanted"),
    [
        ("llava", 0, "vision_feature_layer", -2),  # hidden state 3 of 4 is 2 of 3
        ("llava-positive", 0, "vision_feature_layer", 1),
        ("llava-positive", 2, "vision_feature_layer", 2),  # the third block is behind what is read
        ("vip-llava", 1, "vision_feature_layer", [-2, -3, 1]),
    ],
)
def test_features_that_are_chosen_by_number_elsewhere_are_numbered_again(name, block, key, wanted):
    model = built(name)
    assert shorten(model, [f"model.vision_tower.encoder.layers.{block}"], MANY[name].example).config.to_dict()[key] == (
        wanted
    )


def test_the_last_state_may_have_gone_through_a_norm_and_needs_an_example():
    """LLaVA reads the state before the last block: with it gone that is the last."""
    path, example = "model.vision_tower.encoder.layers.3", MANY["llava"].example
    with pytest.raises(ValueError, match="'vision_feature_layer' of LlavaConfig may speak of the blocks by number"):
        shorten(built("llava"), [path])
    assert shorten(built("llava"), [path], example).config.vision_feature_layer == -1


def test_a_setting_that_is_not_known_is_settled_by_a_run(monkeypatch):
    """A number that could mean a block, or a state, or nothing: the one with which the outputs are right."""
    monkeypatch.delitem(configs._NUMBERED, "vision_feature_layer")
    paths, example = ["model.vision_tower.encoder.layers.0"], MANY["llava-positive"].example
    with pytest.raises(ValueError, match="'vision_feature_layer' of LlavaConfig may speak"):
        shorten(built("llava-positive"), paths)
    assert shorten(built("llava-positive"), paths, example).config.vision_feature_layer == 1
    assert shorten(built("llava"), paths, MANY["llava"].example).config.vision_feature_layer == -2


@pytest.mark.parametrize(
    ("name", "path", "features", "indices"),
    [
        ("dinov2-backbone", "encoder.layer", ["stage1", "stage3"], [1, 3]),
        ("beit-backbone", "beit.layers", ["stage1", "stage2"], [1, 2]),
        ("vitdet", "encoder.layer", ["stage1", "stage3"], [1, 3]),
    ],
)
def test_the_stages_of_a_backbone_are_numbered_again(name, path, features, indices):
    model = shorten(built(name), [f"{path}.1"], MANY[name].example)
    assert (model.out_features, list(model.out_indices)) == (features, indices)
    assert (model.config.out_features, list(model.config.out_indices)) == (features, indices)
    assert model.stage_names == model.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert len(model(**MANY[name].example).feature_maps) == 2


def test_two_stages_that_would_be_one_are_refused():
    model = built("dinov2-backbone")
    with pytest.raises(ValueError, match=r"out_indices reads the blocks \[1, 4\] of 'encoder.layer'.*\[0\]"):
        shorten(model, [f"encoder.layer.{i}" for i in (1, 2, 3)], MANY["dinov2-backbone"].example)
    assert model.out_features == ["stage1", "stage4"]


def test_two_stacks_that_share_a_setting_are_shortened_together(tmp_path):
    lists = ("text_encoder.encoder.layer", "text_decoder.bert.encoder.layer")
    model = shorten(built("blip"), [f"{lists[0]}.1", f"{lists[1]}.2"], MANY["blip"].example)
    check(model, MANY["blip"].example, 4, lists[0], tmp_path)
    assert model.config.text_config.num_hidden_layers == 3 == len(model.get_submodule(lists[1]))
    both = {
        "input_ids": torch.tensor([[29] * 4 + FRAMES["input_ids"][0].tolist()]),
        "pixel_values_images": torch.randn(1, 3, 16, 16),
        **{k: v for k, v in FRAMES.items() if k != "input_ids"},
    }
    towers = [f"model.{tower}.encoder.layers.1" for tower in ("image_tower", "video_tower")]
    model = shorten(built("video-llava"), towers, both)
    check(model, both, 4, "model.image_tower.encoder.layers", tmp_path / "video")


def test_both_stacks_of_t5_write_with_a_cache(tmp_path):
    model = shorten(built("t5"), ["encoder.block.0", "decoder.block.0"], DECODED)
    check(model, DECODED, 4, "encoder.block", tmp_path)
    assert words(model, DECODED) is not None


# --- examples, and what is seen in a run ------------------------------------------------------------------------------


def test_an_example_that_does_not_run_is_named():
    with pytest.raises(
        ValueError, match=r"does not run on the example, which gives words: ValueError: You must specify"
    ):
        shorten(built("llama"), ["model.layers.1"], {"words": torch.tensor([[1]])})
    with pytest.raises(ValueError, match="the example does not run 'model.vision_tower.*it gives input_ids"):
        shorten(built("llava"), ["model.vision_tower.encoder.layers.1"], {"input_ids": torch.tensor([[4, 5]])})


def test_an_example_is_left_as_it_is():
    """BLIP writes into the words that it is given when it generates."""
    before = {k: v.clone() for k, v in MANY["blip-captions"].example.items()}
    shorten(built("blip-captions"), ["vision_model.encoder.layers.1"], MANY["blip-captions"].example)
    assert all(torch.equal(v, MANY["blip-captions"].example[k]) for k, v in before.items())


def test_weights_that_a_class_writes_over_when_it_loads_are_seen_and_kept():
    """Chinese-CLIP sets the word of padding to zero in what it loads, whatever was saved."""
    torch.manual_seed(0)
    text = {**many.SIZE, **many.WORDS, "max_position_embeddings": 16}
    model = hf.ChineseCLIPModel(hf.ChineseCLIPConfig(text_config=text, vision_config=many.EYE, projection_dim=8)).eval()
    words = model.text_model.embeddings.word_embeddings.weight
    shorten(model, ["text_model.encoder.layer.1"], many.BOTH)
    words.data[0] = 1.0
    with pytest.raises(ValueError, match="'text_model.embeddings.word_embeddings.weight' has other values"):
        shorten(model, ["text_model.encoder.layer.1"], many.BOTH)
    assert (words[0] == 1).all() and len(model.text_model.encoder.layer) == 3


def test_a_model_that_is_not_what_its_configuration_says_is_refused_before():
    model = built("llama")
    model.lm_head = nn.Linear(16, 31, bias=False)
    with pytest.raises(ValueError, match=r"before anything is changed: 'lm_head'.weight is \(31, 16\), and there"):
        shorten(model, ["model.layers.1"])


def test_a_model_in_training_stays_in_training():
    model = built("vit").train()
    shorten(model, ["vit.encoder.layer.1" if hasattr(model.vit, "encoder") else "vit.layers.1"])
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("block", [0, 1, 3])
def test_a_block_that_returns_more_than_was_thought_is_refused_by_name(block):
    """TrOCR's blocks return a tuple, of which the model takes the first: of a lone tensor, the first row."""
    from trimtab import Anatomy

    model = built("trocr")
    method = DAS(plan=(f"model.decoder.layers.{block}",), adapters="none")
    anatomy = Anatomy.of(model)
    method.assume(model, anatomy)
    method.attach(model, anatomy)
    ids = torch.randint(3, 30, (3, 6))
    if {b.returns_tuple for b in anatomy.blocks()} == {True}:
        assert model(input_ids=ids).logits.shape == (3, 6, 30)
        return
    with pytest.raises(AnatomyError, match="set `returns_tuple"):
        model(input_ids=ids)

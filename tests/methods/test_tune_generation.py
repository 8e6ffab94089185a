"""Tuned models that generate, that keep an encoder's outputs, and whose modules run more than once."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import trimtab
from tests.methods.test_tune_copies import PIXELS, WORDS, Fused, bart, images, learned, t5, texts, tuned, vit
from trimtab.anatomy import AnatomyError
from trimtab.methods import METHODS

# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}])
def test_several_answers_a_source_are_each_computed_with_their_source(how):
    model = learned(tuned(bart(), "unipt"))
    mask = torch.ones_like(WORDS)
    torch.manual_seed(0)
    out = model.generate(input_ids=WORDS, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, use_cache=False,
                         return_dict_in_generate=True, output_logits=True, **how)  # fmt: skip
    rows = len(out.sequences) // 2
    with torch.no_grad():
        plain = model(WORDS.repeat_interleave(rows, 0), attention_mask=mask.repeat_interleave(rows, 0),
                      decoder_input_ids=out.sequences[:, :-1], use_cache=False).logits  # fmt: skip
        again = model(WORDS, attention_mask=mask, decoder_input_ids=out.sequences[::rows, :-1], use_cache=False).logits
    assert torch.allclose(plain[::rows], again, atol=1e-5)
    if rows > 1:
        assert torch.allclose(torch.stack(out.logits, 1)[:, :3], plain[:, :3], atol=1e-4)


def decoded(model: nn.Module, rows: list[int], mask: torch.Tensor, **memory) -> torch.Tensor:
    return model(attention_mask=mask[rows], decoder_input_ids=WORDS[rows, :5], use_cache=False, **memory).logits


def test_an_encoder_s_outputs_may_be_kept_and_read_later():
    """Also when it has run on something else since, in another order of rows, and some of them twice."""
    model, mask = learned(tuned(bart(), "unipt")), torch.ones_like(WORDS)
    mask[1, 5:] = 0
    with torch.no_grad():
        first, other = (model.model.encoder(ids, mask) for ids in (WORDS, WORDS.flip(1)))
        texts(model)
        for ids, outputs in ((WORDS, first), (WORDS.flip(1), other)):
            for rows in ([0, 1], [1, 0], [0, 1, 0]):
                wanted = decoded(model, rows, mask, input_ids=ids[rows])
                memory = type(outputs)(last_hidden_state=outputs.last_hidden_state[rows])
                assert torch.allclose(decoded(model, rows, mask, encoder_outputs=memory), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["unipt", "lst", "sherl", "side-tuning", "shallow-prompt", "deep-prompt"])
def test_blip_writes_captions_beside_what_is_added(name):
    """Its own `generate` runs the picture's tower, and a norm behind it, before the words are written."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 40, "encoder_hidden_size": 16, "pad_token_id": 0, "sep_token_id": 2, "eos_token_id": 2,
            "bos_token_id": 1, "initializer_range": 0.2, **sizes}  # fmt: skip
    config = BlipConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **sizes})
    model = learned(tuned(BlipForConditionalGeneration(config).eval(), name), 0.3)
    batch = {"pixel_values": PIXELS, "input_ids": WORDS[:, :3], "attention_mask": torch.ones_like(WORDS[:, :3])}
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True,
                             output_logits=True)  # fmt: skip
        words = out.sequences[:, :-1]
        plain = model(pixel_values=PIXELS, input_ids=words, attention_mask=torch.ones_like(words)).logits
    assert torch.allclose(torch.stack(out.logits, 1), plain[:, -4:], atol=1e-4)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
@pytest.mark.parametrize("make", [bart, t5])
def test_beams_and_several_answers_go_on_from_a_cache(make, how):
    """Beams change places in the cache, the side network's part with them."""
    model, found = learned(tuned(make(), "unipt"), 0.3), []
    mask = torch.ones_like(WORDS)
    mask[1, :3] = 0
    for cache in (True, False):
        torch.manual_seed(0)
        options = {"use_cache": cache, "return_dict_in_generate": True, "output_logits": True, **how}
        found.append(
            model.generate(input_ids=WORDS, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, **options)
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    with_cache, without = (torch.stack(f.logits) for f in found)
    assert torch.allclose(with_cache, without, atol=1e-4)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                            num_attention_heads=2, pad_token_id=0, initializer_range=0.3)  # fmt: skip
    return learned(tuned(hf.LlamaForCausalLM(config).eval(), "unipt"), 0.3)


def test_several_tokens_at_a_time_after_padding_go_on_from_a_cache():
    model, mask = llama(), torch.ones_like(WORDS)
    mask[1, :2] = 0
    with torch.no_grad():
        whole = model(WORDS, attention_mask=mask, use_cache=False).logits
        cache, found = hf.DynamicCache(config=model.config), []
        for start, stop in ((0, 3), (3, 4), (4, WORDS.shape[1])):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            found.append(model(WORDS[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache,
                               position_ids=positions).logits)  # fmt: skip
        plain = model(
            WORDS, attention_mask=mask, use_cache=False, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    assert torch.allclose(torch.cat(found, 1)[mask == 1], plain[mask == 1], atol=1e-5)
    assert not torch.allclose(whole[1, -1], whole[0, -1], atol=1e-2)


def test_a_cache_that_the_side_network_has_not_seen_filled_is_refused():
    model = llama()
    cache = hf.DynamicCache(config=model.config)
    model(WORDS, past_key_values=cache)  # with gradients: nothing is kept beside a graph
    with torch.no_grad(), pytest.raises(AnatomyError, match="cache of 7 tokens, of which the side network has kept 0"):
        model(WORDS[:, :1], past_key_values=cache)
    with pytest.raises(AnatomyError, match="called with the newest token alone"):
        model(WORDS[:, :1], past_key_values=cache)


def test_unipt_goes_on_beside_a_cache_of_states():
    """Mamba's has states and counts no tokens."""
    config = hf.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4,
                            pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = hf.MambaForCausalLM(config).eval()
    trimtab.adapt(model, example={"input_ids": WORDS}).tune("unipt")
    learned(model)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = [torch.stack(model.generate(WORDS, output_logits=True, use_cache=c, **how).logits) for c in (True, False)]
    assert torch.allclose(*found, atol=1e-4)


def test_a_cache_of_states_is_left_out_and_named():
    config = hf.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4,
                            pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = hf.MambaForCausalLM(config).eval()
    trimtab.adapt(model, example={"input_ids": WORDS}).tune("sherl")
    learned(model)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    out = model.generate(WORDS, **how)
    assert torch.equal(out[:, -1], model(out[:, :-1]).logits[:, -1, :].argmax(-1))
    with pytest.raises(AnatomyError, match="called with the newest token alone"):
        model.generate(WORDS, use_cache=True, **how)


def test_results_of_another_call_are_not_read():
    model = learned(tuned(bart(), "unipt"))
    with torch.no_grad():
        plain = bart().model.encoder(WORDS.flip(1))  # what no side network has seen
        texts(model)
        for rows in ([0, 1], [0, 1, 0]):
            memory = type(plain)(last_hidden_state=plain.last_hidden_state[rows])
            with pytest.raises(AnatomyError, match="run both towers in one call, on the inputs of the first"):
                decoded(model, rows, torch.ones_like(WORDS), encoder_outputs=memory)
        kept = model.model.encoder(WORDS)
    learned(model)
    with pytest.raises(AnatomyError, match="'encoder' as it was before its side network was trained further"):
        decoded(model, [0, 1], torch.ones_like(WORDS), encoder_outputs=kept)


@pytest.mark.parametrize("name", ["unipt", "lst", "sherl", "side-tuning", "shallow-prompt", "deep-prompt"])
def test_t5_writes_beside_what_is_added(name):
    model = learned(tuned(t5(), name), 0.2)
    out = model.generate(input_ids=WORDS, attention_mask=torch.ones_like(WORDS), max_new_tokens=3, min_new_tokens=3,
                         num_beams=2, return_dict_in_generate=True, output_scores=True)  # fmt: skip
    with torch.no_grad():
        logits = model(WORDS, decoder_input_ids=out.sequences[:, :-1], use_cache=False).logits
    words = out.sequences[:, 1:, None]
    scores = logits.log_softmax(-1).gather(2, words).sum(dim=(1, 2)) / words.shape[1]
    assert torch.allclose(scores, out.sequences_scores, atol=1e-4)


# --- modules that run more than once ----------------------------------------------------------------------------------


class Looped(Fused):
    """A tower that goes over its blocks twice, or on two inputs of its own, or whose blocks are one."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "one":
            self.blocks[1] = self.blocks[0]

    def forward(self, x):
        if self.kind == "siamese":
            return super().forward(x) - super().forward(x.flip(0))
        return super().forward(super().forward(x) if self.kind == "twice" else x)


SIDES = ("unipt", "lst", "sherl", "side-tuning")


@pytest.mark.parametrize("name", SIDES)
def test_a_tower_that_runs_on_its_own_result_is_named(name):
    model = Looped("twice").eval()
    METHODS[name](**({"initialise": "random"} if name == "lst" else {})).attach(model, model.anatomy())
    with pytest.raises(AnatomyError, match=f"{name}: block 'blocks.0' takes in what 'blocks.1' put out: .* several"):
        model(torch.randn(2, 5, 16))


@pytest.mark.parametrize("name", [*SIDES, "deep-prompt"])
def test_a_tower_may_run_on_two_inputs(name):
    model = Looped("siamese").eval().requires_grad_(False)
    METHODS[name](**({"initialise": "random"} if name == "lst" else {})).attach(model, model.anatomy())
    learned(model)
    x = torch.randn(2, 5, 16)
    out = model(x)
    assert out.abs().max() > 0.1 and torch.allclose(out, -model(x.flip(0)), atol=1e-6)
    out.square().sum().backward()
    assert any(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [*SIDES, "deep-prompt"])
def test_blocks_that_are_one_module_are_named(name):
    model = Looped("one")
    method = METHODS[name](**({"initialise": "random"} if name == "lst" else {}))
    with pytest.raises(
        AnatomyError, match=f"{name}: blocks 'blocks.0' and 'blocks.1' of tower 'vision' are one module"
    ):
        method.attach(model, model.anatomy())


@pytest.mark.parametrize("name", ["unipt", "lst", "deep-prompt"])
def test_what_is_frozen_may_be_cast_after_attaching(name):
    model = learned(tuned(vit(), name))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    images(model).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_encoder_and_its_decoder_belong_together(whole):
    model = learned(tuned(bart(), "unipt"))
    wanted = texts(model).detach()
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model.model.encoder = torch.compile(model.model.encoder, backend="eager")
    found = texts(model)  # once, with gradients: each way of calling is compiled by itself, which takes long
    assert torch.allclose(found, wanted, atol=1e-5)
    found.sum().backward()

"""The handle with other people's loops: `transformers.Trainer`, with resuming, TRL, Accelerate, wrappers."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import trimtab
from tests.models.four import SINGLE
from trimtab.methods import METHODS

TUNERS = sorted(n for n, m in METHODS.items() if m.lever == "tune" and n != "linear-probe")
SMALL = {"shallow-prompt": {"prompts": 2}, "deep-prompt": {"prompts": 2}, "partial": {"blocks": 1}}


class Rows(torch.utils.data.Dataset):
    """The samples of the tiny batch, again and again."""

    def __init__(self, batch: dict):
        self.batch = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict:
        return {k: v[i % 2] for k, v in self.batch.items()}


def fitted(tune: str | None, adapters: str = "none") -> trimtab.Adapted:
    torch.manual_seed(0)
    fit = trimtab.adapt(SINGLE.make())
    fit.prune("omp", 0.5)
    fit.skip("random-skip", skip=1, adapters=adapters, reduction=4)
    if tune:
        fit.tune(tune, **SMALL.get(tune, {}))
    return fit


def trainer(fit: trimtab.Adapted, folder, steps: int = 4, save: int = 2) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        save_strategy="steps", save_steps=save, report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
        logging_steps=1, remove_unused_columns=False,
    )  # fmt: skip
    return Trainer(model=fit.model, args=args, train_dataset=Rows(SINGLE.batch), callbacks=fit.callbacks())


def tensors(fit: trimtab.Adapted) -> dict:
    return dict(fit.model.state_dict())


@pytest.mark.parametrize(
    ("tune", "adapters"), [*((t, "none") for t in TUNERS), (None, "parallel"), ("lora", "parallel")]
)
def test_a_trainer_resumes_and_its_checkpoint_is_a_folder_of_the_handle(tune, adapters, tmp_path):
    whole = fitted(tune, adapters)
    trainer(whole, tmp_path / "whole").train()
    assert whole.masks.revived(whole.model) == []

    again = fitted(tune, adapters)
    trainer(again, tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(again)[name], value, rtol=1e-5, atol=1e-6)

    third = trimtab.adapt(SINGLE.make(), tmp_path / "whole" / "checkpoint-4")
    with torch.no_grad():
        found = third.model(**SINGLE.batch).logits
        assert torch.equal(found, whole.model.eval()(**SINGLE.batch).logits)


def test_save_pretrained_writes_what_was_trained_and_refuses_a_push(tmp_path):
    fit = fitted("unipt")
    with torch.no_grad():
        for parameter in fit.parameters():
            parameter.add_(0.1)
    fit.model.save_pretrained(tmp_path / "model")
    assert {"fit.json", "weights.safetensors", "config.json", "model.safetensors"} <= {
        f.name for f in (tmp_path / "model").iterdir()
    }
    again = trimtab.adapt(SINGLE.make(), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again.model(**SINGLE.batch).logits, fit.model.eval()(**SINGLE.batch).logits)
    with pytest.raises(ValueError, match="not pushed as a plain one"):
        fit.model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    with pytest.raises(ValueError, match="adapted"):
        trimtab.save_pretrained(fit.model, tmp_path / "plain")
    with pytest.raises(ValueError, match="trimtab.adapt"):
        trimtab.from_pretrained(tmp_path / "model")


def test_trl(tmp_path):
    trl = pytest.importorskip("trl")
    fit = trimtab.adapt(_llama())
    fit.prune("omp", 0.5).tune("lora", rank=2)
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8
    from datasets import Dataset

    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        bf16=False, dataset_kwargs={"skip_prepare_dataset": True}, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trl.SFTTrainer(fit.model, args, train_dataset=Dataset.from_list(rows), callbacks=fit.callbacks(),
                   processing_class=_tokenizer()).train()  # fmt: skip
    assert fit.masks.revived(fit.model) == []
    assert any(p.abs().max() > 0 for n, p in fit.model.named_parameters() if "lora_B" in n)


def _llama() -> nn.Module:
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=30, **sizes, num_key_value_heads=2, pad_token_id=0))


def _tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0"])}
    made = Tokenizer(models.WordLevel(words, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def test_accelerate():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    fit = fitted("full")
    optimizer = torch.optim.AdamW(fit.parameters(), 1e-2, weight_decay=0.1)
    fit.keep(optimizer)
    model, optimizer = accelerator.prepare(fit.model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        accelerator.backward(SINGLE.loss(model(**SINGLE.batch)))
        optimizer.step()
    assert fit.masks.revived(fit.model) == []


@pytest.mark.parametrize("tune", ["lora", "adapter", "unipt"])
def test_compiled_after_adapting(tune):
    fit = fitted(tune)
    fit.model.eval()
    with torch.no_grad():
        expected = fit.model(**SINGLE.batch).logits
        found = torch.compile(fit.model, backend="eager")(**SINGLE.batch).logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("tune", ["lora", "unipt", "full"])
def test_wrapped_after_adapting(tune, tmp_path):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fit = fitted(tune)
        for wrap in (nn.DataParallel, lambda m: nn.parallel.DistributedDataParallel(m, find_unused_parameters=True)):
            model = wrap(fit.model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
            handles = fit.keep(optimizer)
            optimizer.zero_grad()
            model.train()
            SINGLE.loss(model(**SINGLE.batch)).sum().backward()
            optimizer.step()
            assert fit.masks.revived(fit.model) == []
            for handle in handles:
                handle.remove()
            with pytest.raises(ValueError, match=type(model).__name__):
                trimtab.adapt(model)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="compile"):
        trimtab.adapt(torch.compile(SINGLE.make(), backend="eager"))


def test_a_peft_model_is_adapted_inside():
    import peft

    base = SINGLE.make()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    fit = trimtab.prune(model, "omp", 0.5)
    assert not any("lora" in p for p in fit.masks)
    assert all("base_layer" not in p for p in fit.masks)
    learned = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert learned and all(bool((p != 0).all()) for p in learned)

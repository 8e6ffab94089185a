"""LoRA (Hu et al., ICLR 2022), from the PEFT library: W x + (alpha / r) B A x beside chosen linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.methods.base import METHODS, Method
from trimtab.registry import unknown


@dataclass(frozen=True)
class LoRASettings:
    """Settings of LoRA."""

    rank: int = 4
    """Rank r of the update. DAS's METER and ViLT baselines use 4."""
    alpha: float = 8.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout of the input of A."""
    targets: tuple[str, ...] = ("query", "value", "q_proj", "v_proj", "q", "v", "qkv")
    """Last names of the linear layers inside the towers that get an update; those a model lacks are passed over. A
    fused `qkv` gets one update for all three."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, found {self.rank}")


@contextmanager
def _naming_its_embeddings(model: Any) -> Iterator[None]:
    """Let PEFT ask which layers share the input embeddings' weights, also of classes that cannot tell (detectors)."""
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        model.get_input_embeddings = nn.Identity  # no parameters, none shared
        try:
            yield
        finally:
            del model.get_input_embeddings
    else:
        yield


@METHODS.register("lora")
class LoRA(Method):
    """Low-rank updates of the attention's query and value maps; everything else is frozen."""

    name = "lora"
    lever = "tune"
    trains = "added"
    changes = "tree"
    Settings = LoRASettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        from peft import LoraConfig, inject_adapter_in_model

        s = self.settings
        linears = [p for p, m in model.named_modules() if isinstance(m, nn.Linear) and anatomy.modality(p)]
        chosen = [p for p in linears if p.rsplit(".", 1)[-1] in s.targets]
        if not chosen:
            valid = sorted({p.rsplit(".", 1)[-1] for p in linears})
            raise ValueError(f"lora found none of its targets: {unknown('target', s.targets[0], valid)}")
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        # Whole paths: PEFT takes a list entry as the end of a name, and a full path ends only itself.
        config = LoraConfig(r=s.rank, lora_alpha=s.alpha, lora_dropout=s.dropout, target_modules=chosen)
        with _naming_its_embeddings(model):
            inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():  # PEFT froze everything, also what an earlier method trains
            if name in trainable:
                parameter.requires_grad_(True)
        return anatomy

    def fold(self, model: nn.Module) -> None:
        """W + (alpha / r) B A in the place of W; the updates are gone as modules of their own."""
        from peft.tuners.lora import LoraLayer

        for path, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                owner, _, name = path.rpartition(".")
                setattr(model.get_submodule(owner), name, module.get_base_layer())

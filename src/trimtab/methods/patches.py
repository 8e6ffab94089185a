"""How an adapted model trains and saves: what is set in place of its own `train` and `save_pretrained`.

Both are objects that refer to the model or its handle, so that they go with copies of it (`copy.deepcopy`, pickle).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trimtab.anatomy.structure import HANDLE
from trimtab.methods.modes import drop_again, frozen_in_evaluation, loud_again

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from trimtab.methods.stack import Stack


def keep_dense(model: nn.Module) -> None:
    """Keep torch's encoders from packing padded tokens away in evaluation: hooks and blocks in training mode then would
    be given nested tensors, without padding, which nothing but torch's own fused layer can compute with."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def release(model: nn.Module) -> None:
    """Let a model train and save as its class does again."""
    drop_again(model)
    loud_again(model)
    for name in ("train", "save_pretrained", HANDLE):
        vars(model).pop(name, None)


class Train:
    """`model.train` of an adapted model: what is frozen stays in evaluation mode (see `modes.py`)."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.model).train(self.model, mode)
        if mode:
            frozen_in_evaluation(self.model)
        else:
            drop_again(self.model)
        return self.model


class SavePretrained:
    """`model.save_pretrained` of an adapted model, as a trainer's checkpoints call it.

    It writes every tensor under the name that it has in the adapted model, so that a trainer resumes, and beside them
    what `fit.save` writes, so that `trimtab.adapt(base, folder)` reads the folder. The class's own
    `from_pretrained` cannot.
    """

    def __init__(self, fit: Stack):
        self.fit = fit

    def __call__(self, save_directory: str | Path, is_main_process: bool = True,
                 state_dict: dict[str, Tensor] | None = None, max_shard_size: int | str = "50GB",
                 **options: Any) -> None:  # fmt: skip
        if options.get("push_to_hub"):
            raise ValueError(
                "an adapted model is not pushed as a plain one: `fit.save(folder)` and upload the folder, or "
                "`fit.export(folder)` if its methods fold"
            )
        if not is_main_process:
            return
        from huggingface_hub import save_torch_state_dict

        folder, model = Path(save_directory), self.fit.model
        folder.mkdir(parents=True, exist_ok=True)
        self.fit.write(folder)
        for part in ("config", "generation_config"):
            if getattr(model, part, None) is not None:
                getattr(model, part).save_pretrained(folder)
        save_torch_state_dict(state_dict or model.state_dict(), folder, max_shard_size=max_shard_size)


def checkpoint_callback(fit: Stack) -> TrainerCallback:
    from transformers import TrainerCallback

    class Checkpoints(TrainerCallback):
        """Checkpoints of any module get what `fit.save` writes beside the trainer's own files."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if args.should_save and folder.is_dir():
                fit.write(folder)

    return Checkpoints()

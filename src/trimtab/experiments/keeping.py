"""`load_best_model_at_end`: a training ends with the weights that had the best validation score.

    evaluation    step 50     step 100    step 150    end
    score         0.31        0.42        0.40        0.42 (of the weights after step 100)
    files         best-50     best-100

A file holds what is trained, and buffers: a hundredth of a checkpoint where little is trained. A better score writes a
new one. The one before goes when a checkpoint knows of the better score, so that a training that goes on from its last
checkpoint finds the weights which are the best of its own history.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from trimtab.experiments import many
from trimtab.experiments.plateau import Judge
from trimtab.experiments.schema import RecipeError
from trimtab.files import replace_file


class Best(TrainerCallback):
    """Keeps the weights of the best score so far, and gives them to the model when training ends.

    Args:
        judge: who has heard of a score before.
        model: what is trained; its frozen weights stay as they are.
        folder: for files, of this process alone or of all.
        saving: whether checkpoints are written there, which all processes share.
    """

    def __init__(self, judge: Judge, model: nn.Module, folder: Path, saving: bool):
        self.judge, self.model, self.folder, self.saving = judge, model, folder, saving

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.judge.scores and not self._file().is_file():
            raise RecipeError(
                f"{self._file()}: the weights with the best score so far are missing, which this training goes on with "
                f"(training.load_best_model_at_end): delete {self.folder} to begin anew"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.judge.best() != state.global_step:
            return
        if not self.saving or many.is_first():
            with replace_file(self._file()) as partial:
                save_file({name: tensor.detach().cpu().clone() for name, tensor in self._tensors().items()}, partial)
        if not self.saving:
            self._only_the_best()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.judge.scores and many.is_first():
            self._only_the_best()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.judge.scores:
            return
        many.wait()  # until the first has written it
        kept, tensors = load_file(self._file()), self._tensors()
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(kept[name])
        many.wait()  # until all have read it

    def _file(self) -> Path:
        return self.folder / f"best-{self.judge.best()}.safetensors"

    def _only_the_best(self) -> None:
        for file in self.folder.glob("best-*.safetensors"):
            if file != self._file():
                file.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, by name: trained parameters, and buffers such as running statistics."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return trained | dict(self.model.named_buffers())

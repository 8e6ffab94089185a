"""What a search needs of a run, for an example of a backbone: its one batch again and again, and a training loop."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy import Anatomy
from trimtab.backbones.examples import Example, objective


class Called(nn.Module):
    """A model whose loss is `objective`; what in its batch is no tensor is bound."""

    def __init__(self, inner: nn.Module, batch: dict[str, Any]):
        super().__init__()
        self.inner = inner
        self.batch = {k: v for k, v in batch.items() if isinstance(v, Tensor)}
        self.bound = {k: v for k, v in batch.items() if not isinstance(v, Tensor)}

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)  # transformers' ViLT draws an order of the patches
        return {"loss": objective(self.inner(**batch, **self.bound))}


class SmallSession:
    seed = 0
    folder = None

    def __init__(self, example: Example, model: nn.Module, anatomy: Anatomy):
        self.with_task, self.anatomy = Called(model, example.batch).eval(), anatomy

    @property
    def plain(self) -> nn.Module:
        return self.with_task.inner

    def plain_in(self, model: Any) -> nn.Module:
        return model.inner

    def example(self) -> dict[str, Tensor]:
        return self.with_task.batch

    def loss(self, with_task: Any, batch: dict[str, Tensor]) -> Tensor:
        return with_task(**batch)["loss"]

    def batches(self, split: str, size: int | None = None) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.with_task.batch

    def fit(self, model: Any, steps: int, callbacks: list[Any]) -> list[dict[str, float]]:
        state, control = SimpleNamespace(global_step=0, max_steps=steps), SimpleNamespace(should_save=False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
        for callback in callbacks:
            callback.on_train_begin(None, state, control)
        for _ in range(steps):
            for callback in callbacks:
                callback.on_step_begin(None, state, control)
            optimizer.zero_grad()
            model(**self.with_task.batch)["loss"].backward()
            optimizer.step()
            state.global_step += 1
            for callback in callbacks:
                callback.on_step_end(None, state, control)
        return []

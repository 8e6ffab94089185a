"""A tiny model of every family, with random weights and a batch of two samples: what the matrix of methods and
backbones is made of, and what tests run on.

One entry of `EXAMPLES` is one row of the matrix. They stand in `examples.py` of each family, with the sizes and inputs
of `examples/inputs.py`; an example's class must be described (`@describes`), or be discovered as it should.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.backbones.family import View
from trimtab.randomness import drawn_aside


@dataclass(frozen=True)
class Example:
    """A tiny model and what it is called with.

    Attributes:
        title: the family, and which of its models.
        build: gives the model with fresh weights.
        batch: its keyword arguments for two samples.
        idle: towers that the batch does not reach.
        needs: packages without which it cannot be built.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: dict[str, Any]
    idle: tuple[str, ...] = field(default=(), kw_only=True)
    needs: tuple[str, ...] = field(default=(), kw_only=True)

    def model(self, seed: int = 0) -> Any:
        """The model in evaluation mode, always the same, with random numbers in what its class starts as 0 or 1.

        Raises:
            ImportError: if a package is missing.
        """
        for package in self.needs:
            if find_spec(package) is None:
                named = package.replace("_", "-")
                raise ImportError(f"needs the package {named!r}: pip install -e '.[real]' in trimtab's folder")
        with drawn_aside(seed):
            model = self.build()
            for parameter in model.parameters():
                parameter.data = parameter.data + torch.randn_like(parameter) * 0.05
        return model.eval()


def objective(output: Any) -> Tensor:
    """A scalar that depends on all of a model's output: mean squares of the distances to fixed random numbers.

    For models that are called without labels, and the same for all of them. Sums would do, but that what is normalised
    (features of length 1, probabilities) has no gradient of its sum. Infinite scores, of padding, are left out.
    """
    generator = torch.Generator().manual_seed(0)
    found = [t for t in tensors(output) if t.is_floating_point()]
    aims = [torch.randn(t.shape, generator=generator) for t in found]
    whole = [t.isfinite() for t in found]
    return torch.stack([(t[w] - a[w]).square().mean() for t, a, w in zip(found, aims, whole, strict=True)]).sum()


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a model's output, however it is nested."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [t for part in parts for t in tensors(part)]


EXAMPLES: View[Example] = View("example", lambda family: family.examples)
"""Name -> example, of all families."""

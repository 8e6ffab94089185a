"""What must hold of an adapted model, held against what holds of the plain one: rows, padding, causality, gradients.

A check says in words what is wrong; an empty text means that nothing was found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.inputs import tensors
from tests.models.shrink import VOCABULARY
from tests.models.values import ROWS

Batch = dict[str, Any]


# Fields of outputs with something of every block, of which a shorter model has fewer.
OF_BLOCKS = ("hidden_states", "attentions", "mems", "intermediate_hidden_states", "intermediate_reference_points")


def run(model: nn.Module, batch: Batch, without: tuple[str, ...] = OF_BLOCKS[:2]) -> list[Tensor]:
    """All numbers that the model returns for a batch, without caches, from a fixed random state."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return floating(model(**batch), without)


def floating(out: Any, without: tuple[str, ...] = OF_BLOCKS[:2]) -> list[Tensor]:
    """The numbers in an output, but for the fields that are left out."""
    return [v for v in tensors(out, without) if v.is_floating_point()]


def same(a: list[Tensor], b: list[Tensor], tolerance: float = 2e-4) -> bool:
    """Whether two lists of tensors hold the same numbers; infinite ones where the other has them.

    Small numbers may differ by the rounding of large ones beside them (depths of hundreds: 1e-5 of the largest).
    """

    def near(x: Tensor, y: Tensor) -> bool:
        largest = float(y.abs().nan_to_num(0, 0, 0).amax()) if y.numel() else 0.0
        return torch.allclose(x, y, rtol=tolerance, atol=max(tolerance, 1e-5 * largest), equal_nan=True)

    return len(a) == len(b) and all(x.shape == y.shape and near(x, y) for x, y in zip(a, b, strict=True))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same to the bit."""
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True)
    )


def finite(values: list[Tensor]) -> bool:
    """No number is undefined; masks may be infinite."""
    return all(not v.isnan().any() for v in values)


def row(value: Any, index: int) -> Any:
    """A row's share of a tensor whose first axis holds whole rows, one after another (patches of all pictures, too)."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % ROWS:
        return value
    each = value.shape[0] // ROWS
    return value[index * each : (index + 1) * each]


def alone(batch: Batch, index: int) -> Batch:
    """One row of a batch."""
    if "target_sizes" in batch:  # all patches stand side by side in one picture
        wide = batch["pixel_values"].chunk(ROWS, dim=-1)[index]
        return {**{k: row(v, index) for k, v in batch.items()}, "pixel_values": wide}
    return {k: row(v, index) for k, v in batch.items()}


def repadded(batch: Batch) -> Batch | None:
    """The batch with other words where the second row is padded; None if it has no padding."""
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None or mask.shape != ids.shape or bool(mask.all()):
        return None
    return {**batch, "input_ids": torch.where(mask == 0, (ids + 3) % 60, ids)}


def last_changed(batch: Batch) -> Batch | None:
    """The batch with another last word in the first row; None without words."""
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None:
        return None
    name = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    ids = ids.clone()
    ids[0, -1] = (ids[0, -1] + 5) % 60
    return {**batch, name: ids}


def _valid(values: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """What must not depend on padding: all of the first row, and the valid tokens of the second."""
    out = []
    for value in values:
        if value.ndim and value.shape[0] % ROWS == 0:
            out.append(row(value, 0))
            if mask is not None and value.ndim > 1 and tuple(value.shape[:2]) == tuple(mask.shape):
                out.append(value[1][mask[1] != 0])
    return out


def _earlier(values: list[Tensor], length: int) -> list[Tensor]:
    """All tokens of the first row but its last."""
    return [v[0, :-1] for v in values if v.ndim > 2 and v.shape[0] == ROWS and v.shape[1] == length]


@dataclass
class Facts:
    """What holds of the plain model, so that it must hold of the adapted one.

    Attributes:
        plain: its outputs.
        rows: which rows give the same numbers alone as in the batch.
        padding: whether what stands in padding changes nothing else.
        causal: whether a later word changes nothing at earlier ones.
        writes: whether it writes text, and the same with a cache as without.
        reached: names of parameters that get a gradient other than zero when all are trained.
    """

    plain: list[Tensor]
    rows: list[int] = field(default_factory=list)
    padding: bool = False
    causal: bool = False
    writes: bool = False
    reached: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> Facts:
        """See what holds of a model."""
        found = cls(run(model, batch))
        found.rows = [i for i in range(ROWS) if not depends_on_rows(model, batch, i)]
        found.padding = repadded(batch) is not None and not depends_on_padding(model, batch)
        found.causal = bool(_checked(model, batch)) and not looks_ahead(model, batch)
        found.writes = writes_alike(model, batch)
        model.requires_grad_(True)
        backward(model, batch)
        found.reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        model.zero_grad(set_to_none=True)
        return found

    def broken(self, model: nn.Module, batch: Batch, writing: bool = True) -> str:
        """What holds of the plain model and no longer of this one; `writing`: whether a cache may be used with it."""
        for index in self.rows:
            if depends_on_rows(model, batch, index):
                return f"row {index} depends on another row"
        if self.padding and depends_on_padding(model, batch):
            return "what stands in padding changes other tokens"
        if self.causal and looks_ahead(model, batch):
            return "a later word changes earlier outputs"
        if writing and self.writes and not writes_alike(model, batch):
            return "with a key-value cache it writes other words than without"
        return ""


def depends_on_rows(model: nn.Module, batch: Batch, index: int) -> bool:
    """Whether a row alone gives other numbers than in the batch, where outputs have rows."""
    try:
        single = run(model, alone(batch, index))
    except (RuntimeError, ValueError, IndexError):
        return True
    # Lists with a tensor for each picture are longer for more rows; they come last.
    whole = [(v, s) for v, s in zip(run(model, batch), single, strict=False) if v.ndim and v.shape[0] % ROWS == 0]
    pairs = [(row(v, index), s) for v, s in whole if row(v, index).shape == s.shape]
    return not pairs or not same(*map(list, zip(*pairs, strict=True)))


def depends_on_padding(model: nn.Module, batch: Batch) -> bool:
    """Whether other words where the second row is padded change anything else."""
    other = repadded(batch)
    assert other is not None
    mask = batch["attention_mask"]
    return not same(_valid(run(model, batch), mask), _valid(run(model, other), mask))


def _checked(model: nn.Module, batch: Batch) -> list[Tensor]:
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if ids is None or last_changed(batch) is None:
        return []
    before, after = run(model, batch), run(model, last_changed(batch) or {})
    moved = [(a, b) for a, b in zip(before, after, strict=True) if a.ndim > 2 and a.shape[:2] == ids.shape]
    return [a for a, b in moved if not torch.equal(a[0, -1], b[0, -1])]


def looks_ahead(model: nn.Module, batch: Batch) -> bool:
    """Whether another last word changes what the model says at earlier ones."""
    other = last_changed(batch)
    assert other is not None
    length = batch.get("decoder_input_ids", batch.get("input_ids")).shape[1]  # type: ignore[union-attr]
    return not same(_earlier(run(model, batch), length), _earlier(run(model, other), length))


def writes_alike(model: Any, batch: Batch) -> bool:
    """Whether the model writes words, with the same logits with a key-value cache as without."""
    try:
        return same(*([written(model, batch, cache)] for cache in (True, False)))
    except Exception:
        return False


def written(model: Any, batch: Batch, cache: bool) -> Tensor:
    """The logits of three words in a row after the batch, (3, B, V)."""
    model.eval()
    torch.manual_seed(0)
    prompt = {
        k: v for k, v in copy.deepcopy(batch).items() if not k.startswith(("labels", "decoder"))
    }  # BLIP writes in it
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        out = model.generate(
            **prompt, **options, suppress_tokens=list(range(VOCABULARY // 2, VOCABULARY)), use_cache=cache,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return torch.stack(out.logits)


# --- training ---------------------------------------------------------------------------------------------------------


def loss_of(out: Any) -> Tensor:
    """A number that depends on every finite output that has a gradient: the sum of random projections of each."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(())
    for value in floating(out):
        if value.requires_grad:
            weights = torch.randn(value.shape, generator=generator)
            total = total + torch.where(value.isfinite(), value * weights, 0.0).sum() / value.numel() ** 0.5
    return total


def backward(model: nn.Module, batch: Batch) -> None:
    """One backward pass in evaluation mode; the gradients stay."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = loss_of(model(**batch))
    if loss.requires_grad:
        loss.backward()


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in model.named_parameters() if p.requires_grad)


def step(model: nn.Module, batch: Batch) -> None:
    """One step of training, large enough to be seen."""
    model.train()
    backward(model, batch)
    with torch.no_grad():
        for _, p in trained(model):
            if p.grad is not None:
                p -= 0.05 * p.grad / (p.grad.norm() + 1e-6)
            p += torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05
    model.eval()


def plain_name(name: str) -> str:
    """The parameter of the plain model to which a trained one belongs: LoRA's A and B to the weight beside them."""
    for mark in (".lora_A.", ".lora_B.", ".base_layer."):
        if mark in name:
            return name.split(mark)[0] + (".weight" if "lora" in mark else "." + name.split(mark)[1])
    return name


def without_gradient(model: nn.Module, batch: Batch, facts: Facts) -> list[str]:
    """Trained parameters that get no gradient, though that of the plain model beside them does or none is beside."""
    backward(model, batch)
    plain = set(facts.reached)
    found = []
    for name, p in trained(model):
        if p.grad is None or not bool(p.grad.any()):
            beside = plain_name(name)
            if beside in plain or (beside == name and not _is_plain(name, model)):
                found.append(name)
    model.zero_grad(set_to_none=True)
    return found


def _is_plain(name: str, model: nn.Module) -> bool:
    """Whether a parameter was the plain model's own."""
    own = getattr(model, "census_names", None)
    return own is not None and name in own

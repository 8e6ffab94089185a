"""Image classification: a linear map on the picture's vector, or the class whose description is nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.data.images import decode_rows
from trimtab.tasks.base import TASKS, Batch
from trimtab.tasks.labelled import Labelled

TEMPERATURE = 2.6592  # natural logarithm of the inverse of 0.07, with which CLIP starts


class Scale(nn.Module):
    """What cosines are multiplied by, as its natural logarithm."""

    def __init__(self, backbone: Any):
        super().__init__()
        own = getattr(backbone, "logit_scale", None)
        self.scale = nn.Parameter(torch.tensor(TEMPERATURE if own is None else float(own.detach())))


@TASKS.register("classification")
class Classification(Labelled):
    """Columns `image`, `label` (the name of the class; empty where it is not known).

    Args:
        classes: their names; a recipe that leaves them out takes those of its data source, in its order.
        prompts: templates such as "a photo of a {}." for CLIP's zero-shot classification (section 3.1.4 of its paper):
            a class is the mean of the unit vectors of its name in every template, and there is no map to be trained but
            the scale. None for a linear map on the picture's vector.

    Raises:
        ValueError: if there are no classes, one is named twice, or a template has no `{}`.
    """

    columns = ("label",)
    first_token = False  # a vector may be a mean of all tokens

    def __init__(self, classes: Sequence[str], prompts: Sequence[str] | None = None):
        self.names = list(classes)
        if not self.names or len(set(self.names)) != len(self.names):
            twice = next((n for n in self.names if self.names.count(n) > 1), None)
            found = "none" if twice is None else f"{twice!r} twice"
            raise ValueError(f"classes must be different names, found {found}")
        self.prompts = None if prompts is None else list(prompts)
        for template in self.prompts or ():
            if "{}" not in template:
                raise ValueError(f"prompts: expected a place for the name, {{}}, in each template, found {template!r}")
        if self.prompts is not None and not self.prompts:
            raise ValueError("prompts: expected at least one template, such as 'a photo of a {}.', found none")
        self.kinds = ("dual", "vision") if prompts is None else ("dual",)  # type: ignore[misc]

    @classmethod
    def settings_from(cls, source: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """`classes` are the source's, unless they are given."""
        return dict(given) if "classes" in given else {**given, "classes": list(source.classes())}

    def head(self, backbone: Any) -> nn.Module:
        return nn.Linear(backbone.width, len(self.names)) if self.prompts is None else Scale(backbone)

    def reached(self, anatomy: Any) -> Any:
        """The towers of pictures, unless classes are described in words."""
        if self.prompts is not None:
            return anatomy
        return replace(anatomy, towers=tuple(t for t in anatomy.towers if t.modality == "vision"))

    def collate(self, backbone: Any, rows: list[dict[str, Any]], train: bool) -> Batch:
        rows = decode_rows(rows)
        return {**backbone.images([row["image"] for row in rows]), "labels": self.labels(rows)}

    def example(self, backbone: Any, size: int) -> Batch:
        return {"pixel_values": backbone.example(size)["pixel_values"], "labels": torch.zeros(size, dtype=torch.long)}

    def logits(self, backbone: Any, head: Any, batch: Batch) -> Tensor:
        vectors = backbone.image(batch["pixel_values"]).pooled
        return head(vectors) if self.prompts is None else self._nearest(vectors, self.described(backbone), head)

    def _nearest(self, vectors: Tensor, classes: Tensor, head: Any) -> Tensor:
        return head.scale.exp() * F.normalize(vectors.float(), dim=-1) @ classes.T

    def described(self, backbone: Any) -> Tensor:
        """A unit vector a class, (classes, D)."""
        device, means = next(backbone.parameters()).device, []
        for name in self.names:
            words = backbone.texts([template.replace("{}", name) for template in self.prompts or ()])
            vectors = backbone.text(**{k: v.to(device) for k, v in words.items()}).pooled.float()
            means.append(F.normalize(vectors, dim=-1).mean(dim=0))
        return F.normalize(torch.stack(means), dim=-1)

    def predict(self, backbone: Any, head: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        if self.prompts is None:
            return super().predict(backbone, head, batch)
        # Classes are described once a table, in `finish`, not once a batch.
        return [{"vector": vector} for vector in backbone.image(batch["pixel_values"]).pooled]

    def finish(self, backbone: Any, head: nn.Module, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.prompts is None or not records:
            return records
        with torch.inference_mode():
            vectors = torch.stack([record["vector"] for record in records])
            return self.records(self._nearest(vectors, self.described(backbone), head))

    def query(self, row: dict[str, Any]) -> str:
        return "what is it?"

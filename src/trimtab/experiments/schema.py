"""What a recipe holds: its sections as dataclasses, whose docstrings are the help text of their fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from trimtab.settings import within

if TYPE_CHECKING:
    from trimtab.data.augment import Augmentation


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the file or field, what is wrong and what would be right."""


@dataclass(frozen=True)
class BackboneSpec:
    """The model to start from."""

    name: str
    """Registered name (`trimtab list`), path of a transformers folder or of an official checkpoint file, or an
    architecture (`trimtab list architectures`), which has no weights and is there to be counted."""
    pretrained: bool = True
    """False: the same model with fresh random weights."""
    start_from: str | None = None
    """Another backbone whose weights fill what has the same role (a ViLT can start from a CLIP's vision tower)."""
    attention: Literal["eager", "sdpa"] | None = None
    """transformers' attention implementation; None leaves the model's default."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of an official checkpoint file or of an architecture: `{image_size: 384, tasks: [vqa]}`."""
    tokenizer: str | None = None
    """Folder of a tokenizer in place of the backbone's own; official checkpoint files have none."""
    max_text: int | None = None
    """Tokens at which texts are cut, and of which costs are counted; None cuts where the backbone must, counts 20."""
    pictures: Literal["own", "squash"] = "own"
    """`own`: pictures resized, cropped and padded as the model's authors, or the image processor in its folder, do it;
    `squash`: whole pictures resized to a square, whatever their shape."""


_LIMITS = {
    **dict.fromkeys(("steps", "learning_rate", "head_multiplier", "weight_decay", "clip"), "[0, inf)"),
    **dict.fromkeys(("workers", "patience_share"), "[0, inf)"),
    **dict.fromkeys(("batch_size", "accumulate", "log_every", "save_every", "evaluation_batch", "buffer"), "[1, inf)"),
    **dict.fromkeys(("evaluate_every", "patience", "cache_views"), "[1, inf)"),
    "warmup": "[0, 1]", "beta2": "[0, 1)",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingSpec:
    """How to train, on `transformers.Trainer` with AdamW."""

    steps: int = 200
    """Optimiser steps; 0 evaluates the model as it is. Under `schedule: plateau` the most."""
    batch_size: int = 32
    """Rows a step, of all processes together, before accumulation; the processes must divide it."""
    accumulate: int = 1
    """Batches whose gradients are averaged before a step."""
    shard: bool = False
    """Divide weights, gradients and AdamW's moments among the processes in training (FSDP), for a large backbone; the
    whole model must still have room in each of them before and after."""
    learning_rate: float = 3e-4
    """Peak learning rate of everything but the head."""
    head_multiplier: float = 1.0
    """The head's learning rate as a multiple of `learning_rate`."""
    schedule: Literal["linear", "cosine", "constant_with_warmup", "step", "plateau"] = "cosine"
    """Course of the learning rate after warm-up; `step` falls to a tenth at each of `drops`; `plateau` stays until the
    validation score has not risen for `patience` evaluations, falls linearly to 0 over a quarter of the steps so far
    (at least over `evaluate_every`), and ends there, or begins to fall when 4/5 of `steps` are over."""
    drops: tuple[float, ...] = ()
    """Shares of the steps, rising, after which `schedule: step` multiplies the rate by 0.1: [0.6] is epoch 15 of 25."""
    evaluate_every: int | None = None
    """Steps between evaluations on the validation rows; another one comes at the end. None evaluates none."""
    patience: int | None = None
    """Evaluations without a score greater than all before, after which `schedule: plateau` ends."""
    patience_share: float = 0.0
    """`schedule: plateau` waits this share of the steps at which the best score came too: with 0.5, a best score after
    1,000 steps is waited for until 1,500. Scores of few rows are noisy, and late in training rises are rare."""
    load_best_model_at_end: bool = False
    """Training ends with the weights that had the best score on the validation rows (the first of equal ones), not with
    those after the last step; as in transformers' trainer. It needs `evaluate_every`."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0; under `plateau` of `evaluate_every` * `patience`."""
    weight_decay: float = 0.01
    """AdamW's decay of matrices; biases, norms and scalars have none."""
    beta2: float = 0.999
    """AdamW's second-moment decay."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Mixed precision of the forward pass; `auto` takes bf16 where the device multiplies it natively, else fp32."""
    gradient_checkpointing: bool = False
    """Keep only what enters the backbone's blocks for the backward pass, and compute the rest again there: less memory,
    about a third more time. For backbones of transformers' classes; beside a frozen tower it saves nothing."""
    log_every: int = 20
    """Steps between two points of the training curve."""
    save_every: int | None = None
    """Steps between checkpoints from which an interrupted run resumes; None keeps none."""
    evaluation_batch: int = 64
    """Rows a batch in evaluation."""
    workers: int | None = None
    """Processes that read, decode and collate rows ahead of the model; 0 does it in between steps. None for what fits:
    none in trainings of a few steps, one beside a CPU, up to four beside a GPU. No number depends on it."""
    buffer: int | None = None
    """Rows that are mixed at a time, of blocks of neighbours in a drawn order: for large sets on disks that read
    neighbours faster. None mixes all rows."""
    draft: bool = False
    """Decode JPEG pictures of training at a half, a quarter or an eighth of their size where that is still at least
    what the model sees: several times faster for large photographs, and slightly other pixels. Rows with a `box`,
    evaluation and `cache`, decode them whole."""
    crop: float = 1.0
    """Augmentation: smallest share of a training picture's area that a random crop leaves; 1 for none. It may cut off
    what a question counts or a caption names; a `box` stays whole."""
    light: float = 0.0
    """Augmentation: brightness and contrast of training pictures times 1 - light to 1 + light; 0 for none."""
    randaugment: Literal["vilt", "xvlm", "blip"] | None = None
    """Augmentation: RandAugment as the authors of ViLT (METER and DAS too), X-VLM (MULTIFLOW too) or BLIP train with
    it; None for none. It changes colours, moves and turns pictures; rows with a `box` get changes of colour alone."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Services that get the training curve through transformers' trainer, beside the run's own log.jsonl; each must be
    installed. TensorBoard's files stand in the run's folder."""
    cache: Literal["fp32", "fp16", "int8"] | None = None
    """Write what of the backbone stays the same in training to disk in this precision, once, and train the rest from
    there: heads, side networks, the last blocks."""
    cache_views: int = 1
    """How many collations of the training table are cached, each with captions and augmentation drawn anew."""

    def __post_init__(self) -> None:
        try:
            within(vars(self), **_LIMITS)
            _ = self.augmentation
        except ValueError as error:
            raise RecipeError(str(error)) from error
        if bool(self.drops) != (self.schedule == "step"):
            raise RecipeError(
                f"drops: 'schedule: step' needs them and no other schedule has them, found {list(self.drops)} with "
                f"'schedule: {self.schedule}'"
            )
        if list(self.drops) != sorted(set(self.drops)) or not all(0 < share < 1 for share in self.drops):
            raise RecipeError(f"drops: expected rising shares between 0 and 1, found {list(self.drops)}")
        if self.load_best_model_at_end and self.evaluate_every is None:
            raise RecipeError("load_best_model_at_end: needs scores in training, found no evaluate_every: give the "
                              "steps between evaluations on the validation rows")  # fmt: skip
        self._check_plateau()

    def _check_plateau(self) -> None:
        """RecipeError if the settings of `schedule: plateau` do not go together."""
        if self.schedule != "plateau":
            if self.patience_share:
                raise RecipeError("patience_share: is for 'schedule: plateau', found it with "
                                  f"'schedule: {self.schedule}': leave it out, or set the schedule")  # fmt: skip
            if self.patience is not None:
                raise RecipeError(
                    f"patience: is for 'schedule: plateau', found {self.patience} with 'schedule: {self.schedule}': "
                    "leave it out, or set the schedule"
                )
            return
        if self.evaluate_every is None or self.patience is None:
            missing = "evaluate_every" if self.evaluate_every is None else "patience"
            raise RecipeError(
                f"{missing}: 'schedule: plateau' needs it, found none: give the steps between evaluations on the "
                "validation rows and how many of them without a rise end training, "
                "{evaluate_every: 50, patience: 4}"
            )
        first = self.evaluate_every * (self.patience + 1)
        if self.steps and self.latest_cooldown < first:
            least = max(-(-5 * first // 4), first + self.evaluate_every)
            raise RecipeError(
                f"steps: {self.steps} are over before 'schedule: plateau' can see a plateau: the earliest is after "
                f"{first} steps (evaluate_every * (patience + 1)), and a fifth of the steps is for what follows: give "
                f"at least {least} steps, or evaluate more often"
            )

    @property
    def latest_cooldown(self) -> int:
        """Steps after which a fifth of them is left, and room for an evaluation."""
        return self.steps - max(-(-self.steps // 5), self.evaluate_every or 0)

    @property
    def augmentation(self) -> Augmentation:
        """How training pictures are changed."""
        from trimtab.data.augment import Augmentation  # which needs torch: a wrong name is told without

        return Augmentation(self.crop, self.light, self.randaugment)


@dataclass(frozen=True)
class Recipe:
    """One experiment, resolved: no variants left. `task`, `data` and `methods` are names with their settings."""

    backbone: BackboneSpec
    task: dict[str, Any]
    data: dict[str, Any]
    methods: tuple[dict[str, Any], ...] = ()
    training: TrainingSpec = field(default_factory=TrainingSpec)
    policy: tuple[dict[str, Any], ...] = ()
    seed: int = 0
    costs: bool = True
    """Measure the costs of each run; a sweep whose runs all cost the same can leave it out."""
    title: str = ""
    name: str = "recipe"
    variant: str = "default"

    def to_dict(self) -> dict[str, Any]:
        """All of it, in plain values, as a file gives them: lists, paths as text, numpy's numbers as Python's."""
        out = dataclasses.asdict(self)
        out["methods"] = [dict(m) for m in self.methods]
        out["policy"] = [dict(r) for r in self.policy]
        return _plain(out)

    def to_yaml(self) -> str:
        """A recipe file that says the same; RecipeError with the value that no file can hold."""
        import yaml

        try:
            return yaml.safe_dump(self.to_dict(), sort_keys=False)
        except yaml.representer.RepresenterError as error:
            value = error.args[-1]
            raise RecipeError(f"recipe {self.name}: expected numbers, text, lists and mappings, found {value!r} "
                              f"({type(value).__name__}), which no recipe file can hold") from error  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value

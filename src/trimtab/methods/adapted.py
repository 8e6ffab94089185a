"""The handle on a model: `fit = trimtab.adapt(model)`, and the three levers on it.

fit.prune(...)          masks on the weights, by their plain paths
fit.skip(...)           a plan: blocks out, adapters in
fit.tune(...)           what is trained, in or beside what is left
fit.cost(batch)         what it costs, before training
fit.save(folder)        fit.json and weights.safetensors: see `saved.py`
fit.export(folder)      an ordinary transformers folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trimtab.anatomy import Anatomy
from trimtab.anatomy.structure import HANDLE, under, unwrapped
from trimtab.files import replace_folder
from trimtab.methods.base import METHODS, Method
from trimtab.methods.costs import Costs, count, described
from trimtab.methods.modes import note_idle
from trimtab.methods.placing import check_in_one_place
from trimtab.methods.prune.batches import Loss, calibration
from trimtab.methods.prune.masks import Masks
from trimtab.methods.saved import CONFIG, WEIGHTS, FitError, Saved, check_base, seen_before
from trimtab.methods.session import Batch, BatchSession, path_in
from trimtab.methods.skip.plan import Plan
from trimtab.methods.stack import Stack, detached, differing, is_fake
from trimtab.randomness import drawn_aside
from trimtab.registry import unknown


def adapt(model: nn.Module, folder: str | Path | None = None, *, example: Batch | None = None,
          anatomy: Anatomy | None = None, with_task: nn.Module | None = None) -> Adapted:  # fmt: skip
    """The handle on a model: levers are pulled on it, and what they change is saved and loaded by it.

    The model is changed in place and called as before.

    Args:
        model: the plain model: any module with an anatomy, single or half precision or quantised. Of a `PeftModel` the
            model inside is adapted.
        folder: what `fit.save` wrote, or a run: attached as it was, with the same outputs bit for bit.
        example: a batch of the model's keyword arguments, on which a model that nobody described is watched at work;
            two rows or more, padded as batches are. Not needed with `folder`, which keeps what was seen.
        anatomy: the model's description; None: the registered one of its class, or what is seen.
        with_task: what is called with batches, if it is not the model itself: a module that holds it.

    Raises:
        AnatomyError: if no anatomy is given and none can be found, or the one given does not fit the model.
        FileNotFoundError, FitError: if the folder lacks a file, is damaged, of another version or of another base; the
            message says what differs.
        ValueError: if the model is adapted already, has no values, is spread over several devices, is no part of
            `with_task`, or stands in a wrapper that must come after adapting.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model (torch.nn.Module), found {type(model).__name__}: load it first")
    plain = unwrapped(model)
    if with_task is not None:
        path_in(with_task, plain)
    if (there := handle_of(plain)) is not None:
        raise ValueError(
            f"this {type(plain).__name__} is adapted already ({', '.join(there) or 'no method yet'}): go on "
            "with its handle, which `trimtab.adapt` returned, or load the model again"
        )
    inside = {path: handle_of(module) for path, module in plain.named_modules() if path}
    if part_of_it := next((path for path, fit in inside.items() if fit is not None and fit.methods), ""):
        raise ValueError(
            f"'{part_of_it}' of this {type(plain).__name__} is adapted already "
            f"({', '.join(inside[part_of_it] or ())}): go on with its handle, with the whole as its `with_task`, "
            "or load the model again"
        )
    check_in_one_place(plain)
    if anatomy is None and example is None and folder is not None:
        anatomy = seen_before(Path(folder), plain)
    if anatomy is None:
        anatomy = Anatomy.of(plain, example)
    else:
        anatomy.check(plain, whole=False)
    fit = Adapted(plain, anatomy, with_task or plain)
    fit.example = example if with_task is None else None
    try:
        if folder is not None:
            restore(fit, Path(folder))
    finally:
        if folder is None or fit.methods:  # also of a folder that failed half-way: the model is no plain one any more
            setattr(plain, HANDLE, fit)
    return fit


def handle_of(model: nn.Module) -> Adapted | None:
    """The handle of an adapted model; None for others."""
    return getattr(model, HANDLE, None)


def restore(fit: Adapted, folder: Path) -> None:
    """Attach what a folder holds to a model to which nothing is attached yet; errors as `adapt`."""
    saved = Saved.read(folder)
    check_base(saved.base, fit.base, folder / CONFIG)
    heads = [k for k in saved.learned if k.startswith("task.")]
    if heads and fit.with_task is fit.model:
        raise FitError(
            f"{folder}: holds a task's head too ('{heads[0]}', ...): load it with `trimtab.load_run`, or name the "
            "module that holds model and head (`with_task=`)"
        )
    with drawn_aside():  # first weights are drawn, and then replaced
        for entry, tensors in zip(saved.methods, saved.tensors, strict=True):
            method = METHODS.make(entry["name"], **entry["settings"])
            method.load_state(entry["state"], tensors)
            fit.attach(method, restored=True)
    fit.restore(saved, str(folder / WEIGHTS))


class Adapted(Stack):
    """The handle on a model; see `adapt`. Iterating over it gives the names of what is attached, in order.

    Attributes:
        example: the batch on which the model was watched; None if none was needed.
    """

    example: Batch | None = None

    def __iter__(self) -> Iterator[str]:
        """Names of the attached methods, in order."""
        return iter([m.name for m in self.methods])

    def __repr__(self) -> str:
        return f"Adapted({type(self.model).__name__}, methods: {', '.join(self) or 'none'})"

    def __str__(self) -> str:
        return described(self)

    def look(self, batches: Any) -> Any:
        """Watch the model on the first of some batches, if nothing but its lists of blocks is known yet.

        Returns:
            The batches, from the first one on.
        """
        if (
            self.methods
            or batches is None
            or not any(fact == "blocks" for t in self.anatomy.towers for fact, _ in t.unknown)
        ):
            return batches
        iterator = iter(batches)
        first = next(iterator, None)
        if isinstance(first, Mapping) and self.with_task is self.model:
            self.anatomy = self._described = Anatomy.of(self.model, first)
            self.example = dict(first)
        return batches if iterator is not batches else chain([] if first is None else [first], iterator)

    # --- the levers ---

    def prune(self, method: str = "multiflow", sparsity: float | None = None, batches: Iterable[Batch] | None = None,
              loss: Loss | None = None, **settings: Any) -> Adapted:  # fmt: skip
        """Prune the weights.

        Args:
            method: name of a pruner (`trimtab list methods`).
            sparsity: share of the prunable weights that go, in [0, 1); None: what `pattern` or `masks` says.
            batches: calibration data, dictionaries of the model's keyword arguments, all of which are used. Not needed
                by pruners of weights alone, which see on the first what a module multiplies by itself.
            loss: from the model's output to a scalar, for pruners that need gradients; None: the output's own `loss`.
            settings: of the method; `masks`: a `Masks`, a file of them or a folder, found before.

        Raises:
            ValueError: if a name or setting is unknown, the lever was pulled before, the data are missing, end early or
                are not finite, a whole tower would be emptied, or the masks are for another model.
        """
        given = settings.pop("masks", None)
        if given is not None and not isinstance(given, (str, Path, Masks)):
            raise ValueError(f"masks: expected a `Masks`, a file of them or a folder, found {type(given).__name__}")
        if isinstance(given, (str, Path)):
            settings["masks"] = str(given)
        pruner = METHODS.make(method, lever="prune", sparsity=sparsity, **settings)
        self.check(pruner)
        batches = self.look(batches)
        if is_fake(self.model) and (sparsity is not None or given is not None or settings.get("pattern") is not None):
            pruner.assume(self.model, self.anatomy)  # sizes alone: which weights go does not change what they cost
        elif isinstance(given, Masks):
            pruner.take(given, self.anatomy, self.model, sparsity)
        elif given is not None:
            pruner.take(Masks.read(given, self.model), self.anatomy, self.model, sparsity)
        elif sparsity is None and settings.get("pattern") is None:
            raise ValueError(
                f"{method}: expected `sparsity`, a number in [0, 1), or `pattern`, such as '2:4'; found none"
            )
        else:
            pruner.calibrate(calibration(self, pruner, batches, loss))
        self.attach(pruner)
        return self

    def skip(self, method: str = "das", skip: int | None = None, budget: str | None = None,
             plan: Plan | str | Path | Sequence[str] | None = None, train: Any = None, validation: Any = None,
             steps: int | None = None, loss: Loss | None = None, collate: Callable[[list], Batch] | None = None,
             batch_size: int = 8, learning_rate: float = 1e-3, seed: int = 0, trainer: Any = None,
             folder: str | Path | None = None, **settings: Any) -> Adapted:  # fmt: skip
        """Skip the blocks that a task does not need.

        Args:
            method: name of a search (`trimtab list methods`).
            skip: how many blocks; None: the search's own number, or what `budget` or `plan` says.
            budget: instead: how much less than the model costs now, "25% macs", "20% params", "25% latency".
            plan: instead of a search: a `Plan`, its file, the folder of an adapted model, or paths of blocks.
            train, validation: batches (dictionaries of the model's keyword arguments), or datasets with `collate`.
            steps: training steps of the search.
            loss: from the model's output to a scalar; None: the output's own `loss`.
            collate: rows of a dataset -> a batch.
            batch_size: rows a batch, of datasets.
            learning_rate: of the search's adapters.
            seed: of draws.
            trainer: a `transformers.Trainer` to train the search's copy like, or a function
                `trainer(model, steps, callbacks)`; None: a small loop.
            folder: where an interrupted search is kept, to go on; None keeps none.
            settings: of the method.

        Raises:
            ValueError: if a name or setting is unknown, the lever was pulled before or comes after tuning, no block can
                go, the data are missing or do not fit, or the search cannot go on.
        """
        ways = {"skip": skip, "budget": budget, "plan": plan}
        if len(both := [name for name, value in ways.items() if value is not None]) > 1:
            raise ValueError(f"{method}: {' and '.join(both)} say twice what is skipped: give one of them")
        asked = {"skip": skip, "budget": budget, "search_steps": steps}
        if (
            steps is not None
            and method in METHODS
            and "search_steps" not in METHODS[method].Settings.__dataclass_fields__
        ):
            raise ValueError(f"{method}: its search does not train: leave out `steps`")
        settings |= {k: v for k, v in asked.items() if v is not None}
        if plan is not None:
            settings["plan"] = tuple(plan.skipped) if isinstance(plan, Plan) else plan_setting(plan)
        made = METHODS.make(method, lever="skip", **settings)
        self.check(made)
        if isinstance(plan, Plan):
            plan.check(made.candidates(self.anatomy), self.model, "plan")
        if is_fake(self.model):
            made.assume(self.model, self.anatomy)  # sizes alone: the last blocks go, and cost what others cost
            self.attach(made)
            return self
        train = self.look(train) if collate is None else train
        session = BatchSession(
            self.model, self.anatomy, train, validation, with_task=self.with_task, loss=loss, collate=collate,
            batch_size=batch_size, learning_rate=learning_rate, seed=seed, trainer=trainer, folder=folder,
        )  # fmt: skip
        self.pull(made, session, self.example)
        return self

    def tune(self, method: str = "unipt", heads: bool | str | Sequence[str] = False, name: str = "default",
             **settings: Any) -> Adapted:  # fmt: skip
        """Say what is trained; the rest is frozen and stays in evaluation mode, whatever `model.train()` is told.

        Args:
            method: name of a tuning method (`trimtab list methods`).
            heads: train the anatomy's heads too, or those modules and parameters (dotted paths).
            name: of what is trained, for `switch`.
            settings: of the method.

        Raises:
            ValueError: if a name or setting is unknown, the lever was pulled before, the method does not apply to this
                model or to what is attached, or a head that is named gets no gradient.
        """
        made = METHODS.make(method, lever="tune", **settings)
        self.check(made)
        heads = [heads] if isinstance(heads, str) else heads
        for path in () if isinstance(heads, bool) else heads:
            part(self.model, path)  # named before anything is changed
        detaching = detached(self.anatomy, made.detaches(self.anatomy))
        for path in () if isinstance(heads, bool) else heads:
            if (owner := self.anatomy.owner(path)) is not None and owner.name in detaching:
                raise ValueError(
                    f"{made.name}: the head '{path}' gets no gradient: it stands in the tower {owner.name!r}, "
                    "through which none passes"
                )
        self.attach(made)
        self._train_heads(made, heads)
        self.active = name
        return self

    def _train_heads(self, method: Method, heads: bool | Sequence[str]) -> None:
        replaced = method.replaces()
        if heads is True:
            names = {n for n, _ in (*self.model.named_modules(), *self.model.named_parameters())}
            heads = [p for p in self.anatomy.heads if p in names and not under(p, replaced)]
        for path in heads or ():
            if under(path, replaced):
                raise ValueError(
                    f"{method.name}: the head '{path}' gets no gradient: the side network takes its place (the model "
                    "was changed: load it again, and leave that head out)"
                )
            part(self.model, path).requires_grad_(True)
        if heads:
            self._take_over()  # a head that is trained drops what it drops

    @property
    def prunable(self) -> int:
        """How many weights the masks cover, of what is left of the model; 0 if it was not pruned."""
        return 0 if self.masks is None else self.masks.prunable

    @property
    def sparsity(self) -> float:
        """The share of them that is zero."""
        return 0.0 if self.masks is None else self.masks.sparsity

    # --- costs ---

    def settle(self, batch: Batch, loss: Loss | None = None) -> list[str]:
        """Freeze what is called trained but gets no gradient from a batch's loss; returns its names."""
        idle = self.cost(batch, loss).idle
        own = dict(self.with_task.named_parameters())
        for name in idle:
            own[name].requires_grad_(False)
        note_idle(self.model, [own[name] for name in idle])
        return list(idle)

    def cost(self, batch: Batch, loss: Loss | None = None) -> Costs:
        """What a training batch costs: parameters, those that get a gradient, MACs, saved bytes, bytes on disk.

        Args:
            batch: the model's keyword arguments.
            loss: from the model's output to a scalar; None: the output's own `loss`, else the sum of its tensors.
        """
        return count(self, batch, loss)

    # --- folders ---

    def load(self, folder: str | Path, name: str) -> None:
        """Hold what another `save` wrote beside the active weights; `switch` makes it active.

        Raises:
            FileNotFoundError, FitError: as `adapt`.
            ValueError: if it was made with other methods, settings, masks or plan: those need a model of their own.
        """
        folder = Path(folder)
        theirs, own = Saved.read(folder), self.saved()
        check_base(theirs.base, own.base, folder / CONFIG)
        if why := differing(theirs, own):
            raise ValueError(f"{folder / CONFIG}: {why}: attach the folder to another copy of the base")
        self.hold(name, theirs.learned, str(folder / WEIGHTS))

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write what the methods found and what was learned: `fit.json` and `weights.safetensors`, without the base.

        Raises:
            FileExistsError: if the folder is there.
            ValueError: if nothing is attached, nothing is held under the name, or pruned weights are no longer zero.
        """
        folder = Path(folder)
        if folder.exists() or folder.is_symlink():
            raise FileExistsError(f"{folder}: is there already; name a new folder")
        if not self.methods:
            raise ValueError(
                "nothing is attached, so that there is nothing to save: `fit.prune`, `fit.skip`, `fit.tune`"
            )
        saved = self.saved(name)
        with replace_folder(folder) as partial:
            saved.write(partial)
        return folder

    def export(self, folder: str | Path, sparse: bool = False, dtype: torch.dtype | None = None) -> Path:
        """Write an ordinary transformers folder: updates merged, zeros kept, skipped blocks gone.

        Args:
            folder: a folder that is not there yet.
            sparse: in trimtab's small sparse layout (docs/sparse.md), which `trimtab.from_pretrained` reads.
            dtype: of the written weights; None leaves them as they are.

        Raises:
            FileExistsError: if the folder is there.
            ValueError: if a method cannot fold, with its name and why, or the model is no transformers model.
        """
        from trimtab.storage.checkpoints import save_pretrained

        model = self.folded()
        return save_pretrained(model if dtype is None else model.to(dtype), folder, sparse=sparse)


def part(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """The module or parameter at a path; ValueError with the nearest if there is none."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    if path not in modules and path not in parameters:
        raise ValueError(unknown("head", path, [*modules, *parameters]).split("valid:")[0].strip())
    return modules.get(path) or parameters[path]


def plan_setting(plan: str | Path | Sequence[str]) -> str | tuple[str, ...]:
    """A plan as the setting of a search has it: a path, or the paths of blocks."""
    return str(plan) if isinstance(plan, (str, Path)) else tuple(plan)

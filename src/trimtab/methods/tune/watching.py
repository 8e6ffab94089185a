"""Which calls of a training step stay as they are, and what of them the loss reads: found by running the step.

a step, and the same with other trained values and random numbers -> calls with the same results: these stay
the step on some of its rows, in another order                    -> which axis of a leaf is the sample
the step with longer texts                                        -> which axes are the text
the step with other draws (captions) for the same pictures        -> what is the same in all views
the step played back, every operation followed                    -> what the loss depends on
the step played back with NaN for all else                        -> the same loss and gradients, or an error
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.methods.tune.entries import Entry, outermost, print_of, sources, without_values
from trimtab.methods.tune.following import Followed
from trimtab.methods.tune.frozen import Playing, Recording, between
from trimtab.methods.tune.leaves import Heard, Key, Leaf, Plan, Values, key_name, leaves_heard, leaves_of
from trimtab.methods.tune.listener import Listener, Seen
from trimtab.randomness import begin, drawn_aside


@dataclass(frozen=True)
class Example:
    """Batches on which a step is watched, of the same five or so rows.

    Attributes:
        batch: as they are.
        some: numbers of some of the rows, in another order.
        longer: the same with longer texts; None if all texts have one length, or lengths of several kinds.
        length: of the texts in `batch`.
        short: the same as `batch` with less padding; None if it has none that all rows have.
        redrawn: the same rows with other captions, words and so on; None if there is one view alone.
    """

    batch: Values
    some: Tensor
    longer: Values | None = None
    length: int | None = None
    short: Values | None = None
    redrawn: Values | None = None


class Watcher:
    """Finds the plan of a model's step.

    Args:
        model: the model with its task; `forward(**batch)` gives `{"loss": scalar}`.
        listeners: of its side networks, by name.
        example: batches to watch.
        around: in which a step runs (autocast).
        close: how near losses must be; half precision has larger errors.
    """

    def __init__(self, model: nn.Module, listeners: Mapping[str, Listener], example: Example,
                 around: Callable[[], AbstractContextManager] = nullcontext, close: float = 1e-5):  # fmt: skip
        self.model, self.listeners, self.example, self.around, self.close = model, listeners, example, around, close
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.why: dict[str, str] = {}

    def find(self) -> Plan:
        """The plan.

        Raises:
            ValueError: if nothing stays, what a side network reads does not, or playing back does not give the same.
        """
        if not self.trained:
            raise ValueError("cache: nothing is trained")
        with self._untouched():
            first, heard, loss, gradients = self._watched(seed=0)
            with self._other_values():
                second, again, _, _ = self._watched(seed=1)
            ears = self._ears(heard, again)
            stay = self._that_stay(first, second)
            plan, values = self._settled(first, stay, ears)
            plan = self._drawn(self._texts(plan, values), values)
            return self._proved(plan, values, loss, gradients)

    # --- a step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Leave statistics, counters, modes and random numbers as they were."""
        was = self.model.training
        self.kept = [(b, b.detach().clone()) for b in self.model.buffers()]
        with drawn_aside():
            try:
                yield
            finally:
                self._restore()
                self.model.train(was)

    def _restore(self) -> None:
        with torch.no_grad():
            for buffer, value in self.kept:
                buffer.copy_(value)

    @contextmanager
    def _other_values(self) -> Iterator[None]:
        """With every trained parameter changed."""
        before = [p.detach().clone() for p in self.trained]
        generator = torch.Generator().manual_seed(1)
        try:
            with torch.no_grad():
                for p in self.trained:
                    noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                    p.add_(noise * 0.1 * (p.abs().mean() + 0.1))
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.trained, before, strict=True):
                    p.copy_(value)

    @contextmanager
    def _step(self, seed: int, train: bool = True) -> Iterator[None]:
        self._restore()
        self.model.train(train)
        begin(seed)
        with torch.enable_grad(), self.around():
            yield

    def _watched(self, seed: int) -> tuple[dict[Key, Entry], dict[Key, Any], Tensor, list[Tensor | None]]:
        """Every call of a module and of a side network, the loss and its gradients."""
        modules = {path: m for path, m in self.model.named_modules() if path}
        trains = {path for path, m in modules.items() if any(p.requires_grad for p in m.parameters())}
        counts: Counter[str] = Counter()
        entries: list[Entry] = []
        stack: list[int] = []
        heard: dict[Key, Any] = {}
        made: dict[Key, Any] = {}

        def called(path: str, forward: Callable, args: tuple, kwargs: dict) -> Any:
            entry = Entry((path, counts[path]), list(stack), path in trains)
            counts[path] += 1
            entries.append(entry)
            if entry.trains:
                for i in stack:
                    entries[i].trains = True
            stack.append(len(entries) - 1)
            try:
                result = forward(*args, **kwargs)
            finally:
                stack.pop()
            entry.parts, entry.spec = without_values(leaves_of(key_name(entry.key), result), entry)
            return result

        def hear(name: str, seen: Seen, side: nn.Module) -> Any:
            key = name, counts[f"side {name}"]
            counts[f"side {name}"] += 1
            maps, rest = leaves_heard(key_name(key), seen)
            memory = () if seen.memory is None else sources(seen.memory, made)
            prints = [print_of(v) for _, v in (*maps, *rest.values())]
            heard[key] = ([x for x, _ in maps], {k: x for k, (x, _) in rest.items()}, seen.memory is not None, memory,
                          prints)  # fmt: skip
            out = side(seen)
            made[key] = out
            return out

        with self._step(seed), between(modules, called, self.listeners, hear):
            loss = self.model(**self.example.batch)["loss"]
        gradients = self._gradients(loss)
        return {e.key: e for e in entries}, heard, loss.detach(), gradients

    def _gradients(self, loss: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, self.trained, allow_unused=True))

    # --- what stays -----------------------------------------------------------------------------------------------

    def _ears(self, first: dict[Key, Any], second: dict[Key, Any]) -> dict[Key, Heard]:
        found = {}
        for key, (maps, rest, reads, memory, prints) in first.items():
            if key not in second or second[key][-1] != prints:
                raise ValueError(
                    f"cache: what the side network {key[0]} reads changes in training (with what is trained, or at "
                    "random): train it without `training.cache`"
                )
            if reads and not memory:
                raise ValueError(
                    f"cache: the side network {key[0]} reads another one's result in another order of rows: train it "
                    "without `training.cache`"
                )
            found[key] = Heard(key, tuple(maps), rest, memory)
        return found

    def _that_stay(self, first: dict[Key, Entry], second: dict[Key, Entry]) -> set[Key]:
        """Calls whose results do not change; of the others `why` tells the reason by their paths."""
        stay = set()
        for key, entry in first.items():
            other = second.get(key)
            if entry.trains:
                why = "it holds, or calls, what is trained"
            elif entry.grad:
                why = "a gradient goes through it"
            elif other is None or other.prints != entry.prints:
                why = "what it computes changes with what is trained, or at random (dropout, drawn rows)"
            elif entry.spec is None:
                why = "it hands on what no tensors hold"
            else:
                stay.add(key)
                continue
            self.why.setdefault(key[0], why)
        return stay

    def _settled(self, watched: dict[Key, Entry], stay: set[Key], ears: dict[Key, Heard]) -> tuple[Plan, Values]:
        """The outermost calls that stay, opened up where the loss reads what is no row of a sample; and their values
        in the example."""
        batch = tuple(Leaf(f"batch.{k}", tuple(v.shape), v.dtype) for k, v in self.example.batch.items())
        refused: set[Key] = set()
        batches = [b for b in (self.example.batch, self._part(), self.example.longer) if b]
        while True:
            plan = Plan(outermost(watched, stay - refused), ears, batch)
            raw, *others = (self._recorded(plan, b) for b in batches)
            plan = plan.changed(lambda leaf, a=raw, b=others: self._by_rows(leaf, a, b))  # type: ignore[misc]
            needed = self._needed(plan, raw)
            plan = plan.changed(lambda leaf, needed=needed: replace(leaf, needed=leaf.name in needed))  # type: ignore[misc]
            wrong = {k for k, c in plan.calls.items()
                     if any(isinstance(x, Leaf) and _lost(x) for x in c.leaves)}  # fmt: skip
            if not wrong:
                break
            for path, _ in wrong:
                self.why.setdefault(path, "its rows depend on the other samples of the batch")
            refused |= wrong
        if other := next((x.name for x in plan.leaves() if _lost(x)), None):
            raise ValueError(f"cache: {other} of a sample depends on the other samples of its batch: train it without "
                             "`training.cache`")  # fmt: skip
        return plan, {x.name: x.stored(raw[x.name]) for x in plan.kept()}

    def _part(self) -> Values:
        return {k: v[self.example.some.to(v.device)] for k, v in self.example.batch.items()}

    def _recorded(self, plan: Plan, batch: Values, only: set[str] | None = None) -> Values:
        """Values as the step has them."""
        names = {x.name for x in plan.leaves()} if only is None else only
        plain = plan.changed(lambda leaf: replace(leaf, axis=None, times=1))
        with self._step(0, train=False):
            return Recording(self.model, self.listeners, plain, names).run(batch)

    def _by_rows(self, leaf: Leaf, whole: Values, others: list[Values]) -> Leaf:
        """A leaf with its axis of samples, if it has one and its rows are those of the samples; with its value if that
        is always the same."""
        a, b = whole[leaf.name], others[0][leaf.name]
        if all(o[leaf.name].shape == a.shape and torch.equal(o[leaf.name], a) for o in others):
            return replace(leaf, fixed=a)
        rows, some = len(next(iter(self.example.batch.values()))), self.example.some
        if a.ndim != b.ndim or a.dtype != b.dtype:
            return leaf
        axes = [i for i in range(a.ndim) if a.shape[i] != b.shape[i]]
        if len(axes) != 1:
            return leaf
        axis = axes[0]
        times = a.shape[axis] // rows
        if times < 1 or a.shape[axis] != times * rows or b.shape[axis] != times * len(some):
            return leaf
        found = replace(leaf, axis=axis, times=times)
        return found if self._near(found.stored(a)[some.to(a.device)], found.stored(b)) else leaf

    def _near(self, a: Tensor, b: Tensor) -> bool:
        """Whether two results are one, computed in batches of other sizes."""
        if a.shape != b.shape:
            return False
        if not a.dtype.is_floating_point:
            return torch.equal(a, b)
        a, b = a.float(), b.float()
        largest = a[a.isfinite()].abs().max() if bool(a.isfinite().any()) else a.new_ones(())
        return torch.allclose(a, b, rtol=0, atol=float(largest) * max(1e-4, self.close) + 1e-12, equal_nan=True)

    def _needed(self, plan: Plan, values: Values) -> set[str]:
        """Leaves that the loss depends on."""
        with Followed() as followed:
            mine = {name: followed.named(name, value.clone()) for name, value in values.items()}
            stored = {x.name: x.stored(mine[x.name]) if x.axis is not None else mine[x.name] for x in plan.leaves()}
            plan = plan.changed(lambda leaf: replace(leaf, fixed=None))
            rows = len(next(iter(self.example.batch.values())))
            with self._step(0):
                loss = Playing(self.model, self.listeners, plan).run(stored, rows)["loss"]
            return followed.names(loss) | followed.asked

    # --- what else is known of leaves -----------------------------------------------------------------------------

    def _texts(self, plan: Plan, values: Values) -> Plan:
        """With the axes that grow with the text, and whether what is stored can be cut where a batch's text ends."""
        if self.example.longer is None or self.example.length is None:
            return plan
        longer = self._recorded(plan, self.example.longer)
        more = next(v.shape[1] - self.example.batch[k].shape[1] for k, v in self.example.longer.items()
                    if v.shape != self.example.batch[k].shape)  # fmt: skip
        shapes = {name: tuple(value.shape) for name, value in longer.items()}

        def lengths(leaf: Leaf) -> Leaf:
            now = shapes[leaf.name]
            return replace(leaf, texts=tuple(i for i, (a, b) in enumerate(zip(leaf.shape, now, strict=True)) if a != b))

        plan = plan.changed(lengths)
        self.longer = {x.name: x.stored(longer[x.name]) for x in plan.kept()}
        cut = True
        for leaf in plan.leaves():
            if any(shapes[leaf.name][i] - leaf.shape[i] != more for i in leaf.texts):
                raise ValueError(f"cache: the axes of {leaf.name} do not grow with the text as the text does: train it "
                                 "without `training.cache`")  # fmt: skip
            if leaf.needed and leaf.fixed is None and leaf.texts:  # behind what is always there, or by itself
                short = self.longer[leaf.name]
                for axis, own in zip(leaf.text_axes, leaf.texts, strict=True):
                    short = short.narrow(axis, 0, leaf.shape[own])
                cut = cut and len(leaf.texts) == 1 and self._near(short, values[leaf.name])
        return replace(plan, length=self.example.length, cut=cut)

    def _drawn(self, plan: Plan, values: Values) -> Plan:
        """With leaves marked that are the same in all views."""
        if self.example.redrawn is None:
            return plan
        names = {x.name for x in plan.leaves()}
        before = self._recorded(plan, self.example.batch, names)
        other = self._recorded(plan, self.example.redrawn, names)
        same = {n for n in names if before[n].shape == other[n].shape and torch.equal(before[n], other[n])}
        return plan.changed(lambda leaf: replace(leaf, drawn=leaf.name not in same))

    def idle(self, plan: Plan, batch: Values) -> set[Key]:
        """Calls that need not run again for what is drawn anew in a further view."""
        still = {k for k, c in plan.calls.items() if all(not x.drawn for x in c.leaves if isinstance(x, Leaf))}
        drawn = {x.name for x in plan.kept() if x.drawn}
        with self._untouched(), self._step(0, train=False):
            whole = Recording(self.model, self.listeners, plan, drawn).run(batch)
            try:
                less = Recording(self.model, self.listeners, plan, drawn, still).run(batch)
            except (RuntimeError, ValueError):
                return set()
        return still if all(torch.equal(whole[n], less[n]) for n in drawn) else set()

    # --- the proof ------------------------------------------------------------------------------------------------

    def _proved(self, plan: Plan, values: Values, loss: Tensor, gradients: list[Tensor | None]) -> Plan:
        """The plan, if a step that is played back has the loss and the gradients of the watched one."""
        try:
            found, grads = self._played(plan, values)
        except RuntimeError:  # a model that writes into what its modules hand on
            plan = replace(plan, dense=True)
            found, grads = self._played(plan, values)
        self._compare(float(found), float(loss), "")
        for a, b in zip(grads, gradients, strict=True):
            if (a is None) != (b is None) or not (a is None or b is None or _alike(a, b, 1e-3 + 3 * self.close)):
                raise ValueError("cache: a step played back has other gradients than the same step of the whole model: "
                                 "train it without `training.cache`")  # fmt: skip
        if self.example.longer is not None and not plan.cut:  # what is cut is as long as it is without a cache
            self._compare(float(self._played(plan, self.longer)[0]), float(loss), " with texts padded further")
        if self.example.short is not None:
            with self._step(0):
                short = self.model(**self.example.short)["loss"]
            self._compare(float(found), float(short.detach()), " with texts padded further")
        return plan

    def _played(self, plan: Plan, values: Values) -> tuple[Tensor, list[Tensor | None]]:
        needed = {x.name: values[x.name].clone() for x in plan.kept()}
        rows = len(next(iter(self.example.batch.values())))
        with self._step(0):
            loss = Playing(self.model, self.listeners, plan).run(needed, rows)["loss"]
        return loss.detach(), self._gradients(loss)

    def _compare(self, found: float, wanted: float, how: str) -> None:
        if not abs(found - wanted) <= self.close * max(1.0, abs(wanted)):
            raise ValueError(
                f"cache: a step played back{how} has the loss {found:.7g}, the same step of the whole model "
                f"{wanted:.7g}: train it without `training.cache`"
            )


def _lost(leaf: Leaf) -> bool:
    """Whether the loss reads what is neither a sample's nor always the same."""
    return leaf.needed and leaf.axis is None and leaf.fixed is None


def _alike(a: Tensor, b: Tensor, share: float) -> bool:
    return float((a - b).abs().max()) <= share * float(b.abs().max()) + 1e-7 if a.numel() else True

"""The seam between models and methods: what a method may know about a model.

    Anatomy
      Tower "vision"  (modality, layout, where its result is handed on, where its mask is found)
        Block "encoder.layers.0"  (module path, width, where an adapter may read and write)
        Block "encoder.layers.1"
      Tower "text" ...
      heads: modules that belong to a task or to a projection and are never pruned

A model never imports a method and a method never imports a model: each model family registers one function that
describes it (`@describes("ViltModel")`), and every method works on the description. A model that nobody described runs
on an example and is watched (`seen`). `trimtab anatomy` prints the result (`Anatomy.rows`, `Anatomy.unknown`).

Everything is named by dotted module paths relative to the plain model. Values inside a forward pass are named by
`Tap`s; `read` and `rewrite` attach to them from outside with forward hooks, so that no model's code is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from trimtab.anatomy.parts import PATH, Block, Modality, Tower, Weight, every_tap, with_paths
from trimtab.anatomy.structure import (
    AnatomyError,
    added_by,
    module_at,
    plain_modules,
    plain_parameters,
    refuse_wrapper,
    repeated,
    under,
)
from trimtab.anatomy.weights import matrices
from trimtab.registry import unknown as nearest


@dataclass(frozen=True)
class Anatomy:
    """A model described for methods.

    Attributes:
        towers: in the order in which data flows.
        heads: path prefixes of task heads, projections and poolers: never pruned; a method may train them.
        ignored: path prefixes of repeated modules that are no blocks (a list of classifiers, say).
        source: how the description came about, for error messages and the table.
        seen: whether it was seen on an example, and not described by hand.
        idle: of a seen one, lists of blocks that did not run on the example; they are `ignored` too.
        severed: of a seen one, modules with weights to which no gradient goes back from what the model returns: they
            only decide which tokens or experts are taken, or nothing reads what they make.
    """

    towers: tuple[Tower, ...]
    heads: tuple[str, ...] = field(default=(), metadata=PATH)
    ignored: tuple[str, ...] = field(default=(), metadata=PATH)
    source: str = field(default="given", compare=False)
    seen: bool = field(default=False, compare=False)
    idle: tuple[str, ...] = field(default=(), metadata=PATH, compare=False)
    severed: tuple[str, ...] = field(default=(), metadata=PATH, compare=False)

    @classmethod
    def of(cls, model: nn.Module, example: Mapping[str, Any] | None = None) -> Anatomy:
        """The description of a model: by hand if its class has one, else what is seen when it runs on an example.

        A model may carry LoRA or be a `PeftModel`; its paths are then plain paths below what is given. Blocks that a
        method has put in another's place are left out.

        Args:
            model: any module with lists of blocks.
            example: a batch of its keyword arguments, two rows or more, one of them padded if batches are. Without one,
                inputs are made from the configuration of a transformers model where that tells all; otherwise only the
                lists of blocks are known, and what a method needs beyond them is an error of the method.

        Raises:
            AnatomyError: if the model is wrapped (compiled, parallel), does not run on the example, if nothing is
                registered and no blocks are found, or if the description does not fit the model.
        """
        refuse_wrapper(model)
        for find in FINDERS:
            if (found := find(model, example)) is not None:
                found = found._plain(model)
                found.check(model)
                return found
        raise AnatomyError(
            f"{type(model).__name__} has no list of repeated blocks to discover: describe it with an `Anatomy` of its "
            "own, or register a function with `@trimtab.describes('" + type(model).__name__ + "')`"
        )

    def unknown(self) -> list[str]:
        """A sentence for every fact that is not known, and why."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for t in self.towers:
            for fact, why in t.unknown:
                found.setdefault((t.name, fact, why), [])
            for b in t.blocks:
                for fact, why in b.unknown:
                    found.setdefault((t.name, fact, why), []).append(b.path)
        idle = [f"the blocks in '{path}': they did not run on the example" for path in self.idle]
        return idle + [
            f"{fact} of tower {tower!r}{f', {len(at)} of its blocks' if at else ''}: {why}"
            for (tower, fact, why), at in found.items()
        ]

    def blocks(self, tower: str | None = None) -> Iterator[Block]:
        """All blocks in order, or those of one tower."""
        for t in self.towers if tower is None else (self.tower(tower),):
            yield from t.blocks

    def tower(self, name: str) -> Tower:
        """The tower of that name; ValueError with the nearest names if there is none."""
        for t in self.towers:
            if t.name == name:
                return t
        raise ValueError(nearest("tower", name, [t.name for t in self.towers]))

    def readers(self, name: str) -> tuple[Tower, ...]:
        """The towers that are given a tower's result, without those of which it is given the result itself (pairs)."""
        own = self.tower(name)
        back = own.sources
        return tuple(t for t in self.towers if name in t.sources and t.name != name and t.name not in back)

    def owner(self, path: str) -> Tower | None:
        """The tower to whose scope a module or parameter belongs, None for heads and the rest."""
        if under(path, self.heads):
            return None
        return next((t for t in self.towers if under(path, t.scope)), None)

    def modality(self, path: str) -> Modality | None:
        """Modality of the tower that owns a module or parameter, None for heads and the rest."""
        tower = self.owner(path)
        return tower.modality if tower else None

    def weights(self, model: nn.Module, convolutions: bool = False) -> list[Weight]:
        """The prunable matrices of the plain model in the order of `named_modules`, each tied one once.

        Every `nn.Linear` in a tower's scope, transformers' transposed `Conv1D`, the input projections of every
        `nn.MultiheadAttention`, and each expert of a mixture that says how it stores them; biases, norms, embeddings,
        heads and what shares its parameter with these are left out (as MULTIFLOW's code does), and convolutions too,
        unless they are asked for. `left_whole` tells what is left out.

        Args:
            model: the model that this describes.
            convolutions: also `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` (never transposed ones) in a tower's scope.

        Raises:
            AnatomyError: if PEFT trains a copy of a module in a tower (`modules_to_save`), which masks would not reach.
        """
        return matrices(self, model, convolutions)

    def check(self, model: nn.Module, whole: bool = True) -> None:
        """Raise an AnatomyError unless names fit, every path exists and no repeated block is left out.

        Heads and scopes that a registered description names may be missing: a family has some of them in some models.

        Args:
            model: that it describes.
            whole: False: it may describe a part of the model, so that repeated blocks may be left out.
        """
        self._check_names()
        for path, what in self._paths():
            try:
                module_at(model, path)
            except AttributeError:
                near = nearest("path", path, [n for n, _ in plain_modules(model)]).split("valid:")[0]
                raise AnatomyError(
                    f"the {what} is described at '{path}', but the model has no such module ({near.rstrip()})"
                ) from None
        self._check_places(model)
        described = {b.path for b in self.blocks()}
        for path, children in repeated(model) if whole else ():
            if under(path, self.ignored) or under(path, self.heads):
                continue
            missing = [c for c in children if c not in described and not any(d.startswith(c + ".") for d in described)]
            if missing and not any(path.startswith(d + ".") for d in described):
                raise AnatomyError(
                    f"'{path}' holds {len(children)} repeated blocks, but the anatomy ({self.source}) misses "
                    f"{', '.join(missing[:4])}: describe them in a tower, or name '{path}' in `ignored`"
                )

    def _plain(self, model: nn.Module) -> Anatomy:
        """Without the blocks in whose place something stands that a method added, such as a skip adapter."""

        def stays(block: Block) -> bool:
            try:
                return added_by(module_at(model, block.path)) is None
            except AttributeError:
                return True  # for `check` to name

        towers = (replace(t, blocks=tuple(filter(stays, t.blocks))) for t in self.towers)
        return replace(self, towers=tuple(towers))

    def _check_names(self) -> None:
        names = [t.name for t in self.towers]
        for tower in self.towers:
            if names.count(tower.name) > 1 or not tower.name or "." in tower.name:
                raise AnatomyError(
                    f"the anatomy ({self.source}) has a tower named {tower.name!r}, of {len(names)}: {names}; expected "
                    "names that differ, without dots: modules are stored under them"
                )
            if not tower.blocks:
                raise AnatomyError(f"tower {tower.name!r} of the anatomy ({self.source}) has no block: leave it out")

    def _check_places(self, model: nn.Module) -> None:
        """Parts of no tower are neither pruned nor counted as its: a mistyped scope would change that silently."""
        for tower in self.towers:
            if strange := [b.path for b in tower.blocks if not under(b.path, tower.scope)]:
                raise AnatomyError(
                    f"block '{strange[0]}' lies outside the scope of its tower {tower.name!r}, {list(tower.scope)}: "
                    "name the modules that belong to the tower, those with its blocks among them"
                )
        if self.source != "given":
            return
        names = [*(n for n, _ in model.named_modules(remove_duplicate=False)), *plain_parameters(model)]
        named = [("anatomy's heads", self.heads), *((f"scope of tower {t.name!r}", t.scope) for t in self.towers)]
        for what, paths in named:
            if strange := [path for path in paths if path not in names]:
                near = nearest("path", strange[0], names).split("valid:")[0]
                raise AnatomyError(f"the {what} name '{strange[0]}', but the model has no such part ({near.rstrip()})")

    def _paths(self) -> Iterator[tuple[str, str]]:
        yield from ((tap.path, what) for tap, what in every_tap(self))
        for tower in self.towers:
            yield from ((b.path, f"block of tower {tower.name!r}") for b in tower.blocks)

    def prefixed(self, prefix: str) -> Anatomy:
        """The same anatomy for a model that holds the described one under `prefix` (`vilt`, say)."""
        return with_paths(self, lambda path: f"{prefix}.{path}".rstrip("."))

    def rows(self, model: nn.Module) -> list[dict[str, Any]]:
        """One row a tower: name, modality, layout, blocks, widths, parameters, share, prunable weights.

        Of the plain model alone, each tied parameter once, under its first name.
        """
        once = {id(p): (name, p.numel()) for name, p in reversed(plain_parameters(model).items())}  # tied ones too
        sizes = dict(reversed(once.values()))
        total = sum(sizes.values())
        prunable = {w.path: w.of(model).numel() for w in self.weights(model)}  # all experts of a parameter are there
        rows: list[dict[str, Any]] = []
        for t in self.towers:
            own = {n: s for n, s in sizes.items() if under(n, t.scope) and not under(n, self.heads)}
            widths = sorted({b.width for b in t.blocks})
            rows.append({
                "tower": t.name, "modality": t.modality, "layout": t.layout, "blocks": len(t.blocks),
                "widths": "-".join(map(str, widths)), "params": sum(own.values()),
                "share": sum(own.values()) / max(total, 1), "prunable": sum(prunable.get(n, 0) for n in own),
                "first_block": t.blocks[0].path,
            })  # fmt: skip
        rest = total - sum(int(r["params"]) for r in rows)
        rows.append({"tower": "heads and rest", "modality": "-", "layout": "-", "blocks": 0, "widths": "-",
                     "params": rest, "share": rest / max(total, 1), "prunable": 0, "first_block": ""})  # fmt: skip
        return rows


# Ways to find the anatomy of a model that comes without one, in order; each answers None where it knows nothing.
FINDERS: list[Callable[[nn.Module, Mapping[str, Any] | None], Anatomy | None]] = []

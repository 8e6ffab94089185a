"""Recipes: every experiment is a YAML file that names a backbone, a task, data, methods and how to train.

    backbone: {name: tiny-vilt}
    task: {name: vqa}
    data: {name: pictograms, style: openmoji, train: 2000, test: 500}
    methods: [{name: multiflow, sparsity: 0.63}, {name: full}]
    training: {steps: 200, batch_size: 32, learning_rate: 3.0e-4}
    policy: [{match: "@vision", do: frozen}, {match: "*", do: method}]     what is trained: see `policy.py`
    seed: 0

A recipe may hold `variants` (label -> what differs) and `seeds`; it then stands for one run of each with each. A
`grid` (key -> values) adds a variant for every combination, labelled by its values joined with "-"; `{key}` in
`methods` stands for the value. `seeds` may differ: a mapping from patterns of labels to lists, the first that fits
counts. The sections `task`, `data` and each of `methods` are settings of what their `name` registers; their types,
defaults and help come from the classes there. An unknown key or name is an error with the nearest ones.

`schema.py` has the sections; here files are read and variants, grids, seeds and overrides become one `Recipe` a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

from trimtab import settings
from trimtab.experiments.policy import Rule
from trimtab.experiments.schema import BackboneSpec, Recipe, RecipeError, TrainingSpec
from trimtab.registry import unknown

TOP = (*(f.name for f in fields(Recipe) if f.name not in ("name", "variant")), "seeds", "variants", "grid")
"""Keys of a recipe file: the fields of `Recipe`, and what stands for several runs."""


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of `cls` from a section of a recipe; RecipeError if a key or value in it is wrong."""
    try:
        return settings.build(cls, values, where, "key")
    except ValueError as error:
        raise RecipeError(str(error)) from error


def read(path: str | Path, overrides: Iterable[str] = ()) -> list[Recipe]:
    """The runs that a recipe file stands for, one of each variant with each seed.

    Args:
        path: a YAML file, or the name of a shipped recipe (`trimtab list`).
        overrides: `key=value` with dotted keys (`training.steps=10`, `methods.0.sparsity=0.9`); the value is YAML. They
            come last, after the variants.

    Raises:
        RecipeError: if the file cannot be read, or a key, name or value in it is wrong.
    """
    import yaml

    file = find(path)
    try:
        raw = _load(file.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{file}: expected a mapping with the keys {', '.join(TOP)}")
    return expand(raw, _short_name(file), overrides, str(file))


def _load(text: str) -> Any:
    """What YAML says; an error of it for a key that stands twice in a mapping, of which it would take the last."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    where = key.start_mark
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice, again in line {where.line + 1}: keep one"
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Once)


def find(path: str | Path) -> Path:
    """The file of that path, or the shipped recipe of that name (with or without `.yaml`)."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = recipes_dir()
    for candidate in (shipped / file, shipped / f"{file}.yaml"):
        if candidate.is_file():
            return candidate
    raise RecipeError(f"no recipe file '{path}', and {unknown('recipe', str(path), names())}")


def below(path: str | Path) -> list[str]:
    """The recipes in a folder, or in a shipped one of that name, in the order of their names; else the path itself."""
    for folder in (Path(path), recipes_dir() / path):
        if folder.is_dir() and (files := sorted(folder.glob("*.yaml"))):
            return [str(file) for file in files]
    return [str(path)]


def names() -> list[str]:
    """Names of the shipped recipes: their paths below `recipes/` without `.yaml`."""
    root = recipes_dir()
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def title(name: str) -> str:
    """The title of a shipped recipe."""
    import yaml

    return str(yaml.safe_load(find(name).read_text()).get("title", ""))


def recipes_dir() -> Path:
    """Where the shipped recipes stand: in the installed package, or in the repository beside `src`."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "recipes"


def _short_name(file: Path) -> str:
    root = recipes_dir().resolve()
    whole = file.resolve()
    return str(whole.relative_to(root).with_suffix("")) if whole.is_relative_to(root) else file.stem


def expand(raw: dict[str, Any], name: str, overrides: Iterable[str] = (), where: str = "recipe") -> list[Recipe]:
    """The runs that a mapping stands for, as `read` gives those of a file; `where` starts the message of an error."""
    raw = _normal(raw, where)
    changes = [_override(o) for o in overrides]
    wanted = {k: v for (k, v) in changes if k in ("variants", "seeds", "seed")}
    for key, _ in changes:
        if key.partition(".")[0] == "grid" or key.startswith("seeds."):
            raise RecipeError(f"{where}: '{key}': grids and seeds by pattern are written in the file; choose from them "
                              "with variants=[...] and seeds=[...]")  # fmt: skip
    if "seed" in wanted and "seeds" in wanted:
        raise RecipeError(f"{where}: found seed={wanted['seed']} and seeds={wanted['seeds']}: give one of them")
    listed = {_label(k, where): v for k, v in (raw.get("variants") or {}).items()}
    for label, point in _grid(raw, where).items():
        if label in listed:
            raise RecipeError(f"{where}: the variant {label!r} stands in 'variants' and comes from 'grid': rename it")
        listed[label] = point
    variants = {k: _normal(v or {}, f"{where}: variants.{k}") for k, v in (listed or {"default": {}}).items()}
    if "variants" in wanted:  # variants=[full,unipt] keeps these
        kept = [_label(v, where) for v in _list(wanted["variants"], f"{where}: variants")]
        for label in kept:
            if label not in variants:
                raise RecipeError(f"{where}: {unknown('variant', label, variants)}")
        variants = {k: v for k, v in variants.items() if k in kept}
    for key, _ in changes:
        if key.startswith("variants."):
            label, field = _named(key.removeprefix("variants."), variants)
            if label not in variants or field in ("", "variants", "seeds"):
                problem = "names no field of a variant" if label in variants else unknown("variant", label, variants)
                raise RecipeError(f"{where}: '{key}': {problem}")
    out = []
    for label, difference in variants.items():
        if misplaced := {"variants", "seeds", "grid"} & difference.keys():
            raise RecipeError(f"{where}: variants.{label}: '{min(misplaced)}' belongs beside 'variants', not into one")
        own = [difference["seed"]] if "seed" in difference else _seeds(raw, label, where)
        given = [wanted["seed"]] if "seed" in wanted else own
        for seed in _list(wanted.get("seeds", given), f"{where}: seeds"):
            merged = _merge({k: v for k, v in raw.items() if k not in ("variants", "seeds", "grid")}, difference)
            merged["seed"] = seed
            for key, value in changes:
                own_key = key.removeprefix(f"variants.{label}.")  # variants.full.training.steps=9 is for that one
                if key not in ("variants", "seeds", "seed") and not own_key.startswith("variants."):
                    _assign(merged, own_key, value, where)
            out.append(_resolve(merged, name, label, where))
    return out


def _label(label: Any, where: str) -> str:
    """The label of a variant, which YAML may have read as a number."""
    if isinstance(label, bool) or not isinstance(label, (str, int, float)):
        raise RecipeError(f"{where}: variants: expected a label of letters or numbers, found {label!r}: quote it")
    return str(label)


def _named(key: str, variants: Iterable[str]) -> tuple[str, str]:
    """Of `LABEL.FIELD` the label, which may have dots, and the field."""
    known = [label for label in variants if key == label or key.startswith(f"{label}.")]
    if not known:
        label, _, field = key.partition(".")
        return label, field
    longest = max(known, key=len)
    return longest, key.removeprefix(longest).removeprefix(".")


def _normal(raw: Any, where: str) -> dict[str, Any]:
    """A recipe or a variant in its long form: sections as mappings, methods as a list; checks keys and shapes."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: expected a mapping, found {raw!r}")
    out = dict(raw)
    for key, value in raw.items():
        if key not in TOP:
            raise RecipeError(f"{where}: {unknown('key', key, TOP)}")
        if key in ("backbone", "task", "data") and isinstance(value, str):
            out[key] = {"name": value}
        elif value is None and key in ("training", "variants", "seeds", "grid"):
            del out[key]  # a key without a value in YAML is as good as none
        elif key in ("backbone", "task", "data", "training", "variants", "grid") and not isinstance(value, dict):
            raise RecipeError(f"{where}: {key}: expected a mapping, found {value!r}")
        elif key == "methods":
            entries = (
                [value] if isinstance(value, (str, dict)) else (_list(value, f"{where}: methods") if value else [])
            )
            out[key] = [{"name": m} if isinstance(m, str) else m for m in entries]
        elif key == "policy":
            rules = _list(value, f"{where}: policy") if value else []
            out[key] = [{"match": r} if isinstance(r, str) else r for r in rules]
        elif key == "seeds":
            for seeds in value.values() if isinstance(value, dict) else [value]:
                _list(seeds, f"{where}: seeds")
    return out


def _grid(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The variants of a grid: its values filled into `methods`."""
    axes = raw.get("grid") or {}
    values = [_list(v, f"{where}: grid.{k}") for k, v in axes.items()]

    def fill(tree: Any, chosen: dict[str, Any]) -> Any:
        if isinstance(tree, dict):
            return {k: fill(v, chosen) for k, v in tree.items()}
        if isinstance(tree, list):
            return [fill(v, chosen) for v in tree]
        if not isinstance(tree, str):
            return tree
        for key, value in chosen.items():
            if tree == f"{{{key}}}":
                return value  # as it is: a number stays one
            tree = tree.replace(f"{{{key}}}", str(value))
        return tree

    points = [dict(zip(axes, point, strict=True)) for point in product(*values)] if axes else []
    methods = raw.get("methods", [])
    for key in axes:
        if f"{{{key}}}" not in repr(methods):
            raise RecipeError(f"{where}: grid.{key}: expected '{{{key}}}' in a setting of 'methods', found none: its "
                              "values would change nothing")  # fmt: skip
    labels = ["-".join(map(str, p.values())) for p in points]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise RecipeError(f"{where}: grid: two of its points are labelled {twice!r}: leave out what repeats")
    return {label: {"methods": fill(methods, p)} for label, p in zip(labels, points, strict=True)}


def _seeds(raw: dict[str, Any], label: str, where: str) -> list[Any]:
    seeds = raw.get("seeds") or [raw.get("seed", 0)]
    if not isinstance(seeds, dict):
        return seeds
    for pattern, own in seeds.items():
        if fnmatchcase(label, pattern):
            return own
    raise RecipeError(f"{where}: seeds: no pattern fits the variant '{label}'; found {', '.join(seeds)}; end with '*'")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: expected a list that is not empty, found {value!r}")
    return value


def _resolve(raw: dict[str, Any], name: str, variant: str, where: str) -> Recipe:
    for key in ("backbone", "task", "data"):
        if key not in raw:
            raise RecipeError(f"{where}: the key '{key}' is missing")
    raw = _normal(raw, where)  # an override may have brought a short form back
    methods = raw.get("methods", [])
    for what, part in [("task", raw["task"]), ("data", raw["data"]), *(("methods", m) for m in methods)]:
        if not isinstance(part, dict) or "name" not in part:
            raise RecipeError(f"{where}: every entry of '{what}' needs a 'name'")
    for i, rule in enumerate(raw.get("policy") or []):
        if not isinstance(rule, dict) or "match" not in rule:
            raise RecipeError(f"{where}: policy.{i}: expected a mapping with a 'match', found {rule!r}")
        build(Rule, rule, f"{where}: policy.{i}")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RecipeError(f"{where}: seed: expected a whole number, found {seed!r}")
    costs = raw.get("costs", True)
    if not isinstance(costs, bool):
        raise RecipeError(f"{where}: costs: expected true or false, found {costs!r}")
    return Recipe(
        backbone=build(BackboneSpec, raw["backbone"], f"{where}: backbone"),
        task=raw["task"],
        data=raw["data"],
        methods=tuple(dict(m) for m in methods),
        training=build(TrainingSpec, raw.get("training", {}), f"{where}: training"),
        policy=tuple(dict(r) for r in raw.get("policy") or ()),
        seed=seed,
        costs=costs,
        title=raw.get("title", ""),
        name=name,
        variant=variant,
    )


def _merge(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, everything else is replaced."""
    out = deepcopy(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else deepcopy(value)
    return out


def _override(text: str) -> tuple[str, Any]:
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key:
        raise RecipeError(f"'{text}': expected key=value, such as training.steps=10")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{text}': the value is not YAML: {error}") from error


def _assign(tree: Any, key: str, value: Any, where: str) -> None:
    *path, last = key.split(".")
    if path == [] and last not in TOP:
        raise RecipeError(f"{where}: {unknown('key', last, TOP)}")
    if path and path[0] not in TOP:
        raise RecipeError(f"{where}: {unknown('key', path[0], TOP)}")
    try:
        for part in path:
            if isinstance(tree, list):
                tree = tree[int(part)]
            else:
                if isinstance(tree.get(part), str):  # `data: pictograms` is short for a mapping with a name
                    tree[part] = {"name": tree[part]}
                tree = tree.setdefault(part, {})
        if isinstance(tree, list):
            tree[int(last)] = value
        else:
            tree[last] = value
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise RecipeError(f"{where}: '{key}' does not name a field of the recipe ({error})") from error

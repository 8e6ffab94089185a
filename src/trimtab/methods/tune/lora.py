"""LoRA (Hu et al., ICLR 2022), from the PEFT library: W x + (alpha / r) B A x beside chosen linear layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from trimtab.anatomy import Anatomy, Tower
from trimtab.anatomy.structure import is_linear, is_wrapped, module_at, plain_modules, replace_module, under
from trimtab.methods.base import METHODS, Method
from trimtab.methods.tune.fused import FUSED, is_fused, transparent
from trimtab.methods.tune.roles import queries_and_values, silent_attentions, wrappers
from trimtab.registry import unknown
from trimtab.settings import within

if TYPE_CHECKING:
    from trimtab.methods.prune.masks import Masks


@dataclass(frozen=True)
class LoRASettings:
    """Settings of LoRA."""

    rank: int = 4
    """Rank r of the update. DAS's METER and ViLT baselines use 4."""
    alpha: float = 8.0
    """The update is scaled by alpha / r."""
    dropout: float = 0.0
    """Dropout of the input of A."""
    targets: Literal["all-linear"] | tuple[str, ...] | None = None
    """Last names, or longer ends of paths, of the linear layers (and torch's attentions) inside the towers that get an
    update. `all-linear`: every linear layer of the towers' blocks, but those whose weight is read without calling them
    (in an nn.MultiheadAttention, a Mamba's mixer). None: the layers that give an attention's queries and values, in
    every tower. A fused layer gets one update for all three, as does the fused weight of an nn.MultiheadAttention."""
    towers: tuple[str, ...] | None = None
    """Which towers; None for all."""

    def __post_init__(self) -> None:
        within(vars(self), rank="[1, inf)", alpha="(0, inf)", dropout="[0, 1)")


ROOT = "the whole model"  # no module has a name like this, so that a path from here is the end of no other path
READ_BY_MIXERS = {"x_proj", "dt_proj", "out_proj"}  # layers of a Mamba whose weights its fused kernels take


@METHODS.register("lora")
class LoRA(Method):
    """Low-rank updates of the attention's query and value maps; everything else is frozen."""

    lever = "tune"
    trains = "added"
    changes = "tree"
    Settings = LoRASettings

    def attach(self, model: nn.Module, anatomy: Anatomy) -> Anatomy:
        from peft import LoraConfig, inject_adapter_in_model

        s = self.settings
        chosen = self._chosen(model, anatomy)
        self.wrapped = tuple(chosen)
        places = _places(model, chosen)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        # PEFT takes a target as the end of a path, `blocks.0` as `text.blocks.0` too: so paths begin at ROOT. Of a
        # model of experts it takes a layer named `gate_proj` as the experts' one tensor: ROOT is of no kind it knows.
        config = LoraConfig(
            r=s.rank, lora_alpha=s.alpha, lora_dropout=s.dropout,
            target_modules=[f"{ROOT}.{path}" for path, m in chosen.items() if is_linear(m)],
            target_parameters=[f"{ROOT}.{path}.{FUSED}" for path, m in chosen.items() if not is_linear(m)] or None,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sets it by each layer's kind itself
            inject_adapter_in_model(config, nn.ModuleDict({ROOT: model}))
        for name, parameter in model.named_parameters():  # PEFT froze everything, also what an earlier method trains
            if name in trainable:
                parameter.requires_grad_(True)
        for path, others in places.items():
            wrapped = transparent(model.get_submodule(path))
            for other in others:  # one layer under several names is still one
                replace_module(model, other, wrapped)
            if any(isinstance(m, nn.TransformerEncoderLayer) for m in _around(model, path)):
                wrapped.register_forward_pre_hook(_called)
        return anatomy

    def _chosen(self, model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Module]:
        """The layers that get an update, by path.

        Raises:
            ValueError: if a target names none, or a tower that must have some has none, or one is never called or no
                plain layer.
        """
        s = self.settings
        towers = [anatomy.tower(name) for name in s.towers or [t.name for t in anatomy.towers]]
        linears: dict[str, dict[str, nn.Module]] = {t.name: {} for t in anatomy.towers}
        first = {id(m): path for path, m in plain_modules(model) if is_linear(m) or is_fused(m)}
        for path, module in _every_name(model, first):
            if (owner := anatomy.owner(path)) is not None:
                linears[owner.name][path] = module
        chosen: dict[str, nn.Module] = {}
        for tower in towers:
            own = linears[tower.name]
            if s.targets is None:
                paths = self._by_role(model, anatomy, tower, linears, towers)
            elif s.targets == "all-linear":
                paths = _all_linear(model, anatomy, tower, own)
            else:
                paths = [p for p in own if any(_ends(p, target) for target in s.targets)]
            chosen |= {first[id(own[path])]: own[path] for path in paths}
        if isinstance(s.targets, tuple):
            _all_named(s.targets, [path for t in towers for path in linears[t.name]])
        for other in [t for t in anatomy.towers if t not in towers]:
            ids = {id(m) for m in linears[other.name].values()}
            if shared := [path for path, m in chosen.items() if id(m) in ids]:
                raise ValueError(
                    f"lora: '{shared[0]}' is a layer of tower {other.name!r} too, where an update would act as well: "
                    f"name it too, towers {[*(t.name for t in towers), other.name]}, or name other layers in `targets`"
                )
        self._check(model, chosen)
        return chosen

    def _by_role(self, model: nn.Module, anatomy: Anatomy, tower: Tower, linears: dict[str, dict[str, nn.Module]],
                 towers: list[Tower]) -> list[str]:  # fmt: skip
        """The layers of a tower's blocks that give queries and values; ValueError if it has none that is known."""
        found = {t.name: _queries_and_values(model, anatomy, t, linears[t.name]) for t in towers}
        trained, severed = found[tower.name]
        if trained:
            return trained
        blocks = [b.path for b in tower.blocks]
        names = sorted(
            {p.rpartition(".")[2] for p, m in linears[tower.name].items() if under(p, blocks) and is_linear(m)}
        )
        have = f"its blocks have the linear layers {', '.join(names)}" if names else "its blocks have no linear layer"
        if idle := bool(severed) or "gradient" in dict(tower.unknown):
            where = f"'{severed[0]}'" if severed else "it"
            have += f"; no gradient goes back to {where} from what the model returns"
        if silent := [p for b in blocks for p in silent_attentions(model, b)]:
            have += (
                f"; '{silent[0]}' is an nn.MultiheadAttention with weights of their own for keys and values of another "
                "width, which it multiplies without calling a layer"
            )
        others = [name for name, (layers, _) in found.items() if layers]
        ways = [] if idle else ["name layers in `targets`"]  # which would not be trained either
        ways.append(f"leave it out: towers {others}" if others else "tune it in another way")
        raise ValueError(
            f"lora: tower {tower.name!r} has no layer that is known to give queries or values ({have}): "
            f"{', or '.join(ways)}"
        )

    def _check(self, model: nn.Module, chosen: dict[str, nn.Module]) -> None:
        for path, module in chosen.items():
            weight: Any = module._parameters.get("weight" if is_linear(module) else FUSED)
            if weight is None:
                raise ValueError(
                    f"lora: the weight of '{path}' ({type(module).__name__}) is computed anew before each pass: "
                    "an update could not be merged; make it a plain parameter first "
                    "(`torch.nn.utils.parametrize.remove_parametrizations`), or name other layers in `targets`"
                )
            if type(module) is nn.Linear and not weight.is_floating_point():
                raise ValueError(
                    f"lora: the weight of '{path}' is stored as {str(weight.dtype).removeprefix('torch.')} (quantised) "
                    "in a plain nn.Linear, which cannot compute with it: load the model in a quantised form that PEFT "
                    "knows (bitsandbytes, GPTQ, ...), or unquantised"
                )
            if is_fused(module) and self.settings.dropout:
                raise ValueError(
                    f"lora: '{path}' is an nn.MultiheadAttention, whose update is added to its weight, so that its "
                    f"input cannot be dropped: set dropout to 0 (found {self.settings.dropout}), or name layers in "
                    "`targets`"
                )
            if reader := _reader(model, path):
                raise ValueError(
                    f"lora: '{path}' belongs to {reader}, which reads its weight and never calls it: "
                    "an update would not be computed; name longer ends of the other paths in `targets`"
                )
            if is_wrapped(module_at(model, path)):
                raise ValueError(
                    f"lora: '{path}' is wrapped by PEFT already: merge that first (`merge_and_unload`) and adapt the "
                    "merged model, or name other layers in `targets`"
                )

    def follow(self, masks: Masks, model: nn.Module) -> None:
        """Multiply updates of pruned weights by their masks, so that what is trained is what can be merged."""
        from trimtab.methods.tune.masked_lora import follow

        paths = masks.by_parameter(model)
        for layer in self.wrapped:  # a layer may share its weight with the one that the mask names
            wrapped: Any = module_at(model, layer)
            weight = getattr(wrapped.get_base_layer(), getattr(wrapped, "parameter_name", "weight"))
            if (path := paths.get(id(weight))) is not None:
                follow(wrapped, path, masks[path])

    def fold(self, model: nn.Module) -> None:
        """W + (alpha / r) B A in the place of W; the updates are gone as modules of their own."""
        from peft.tuners.lora import LoraLayer

        holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        done: dict[int, nn.Module] = {}
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if not isinstance(module, LoraLayer):
                continue
            if id(module) not in done:
                base: Any = module.get_base_layer()
                name = getattr(module, "parameter_name", "weight")
                weight = getattr(base, name)
                if holders[id(weight)] > 1:  # what shares the weight has no update: it keeps the weight as it is
                    setattr(base, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
                module.merge()
                done[id(module)] = base
            replace_module(model, path, done[id(module)])


def _queries_and_values(model: nn.Module, anatomy: Anatomy, tower: Tower, linears: Mapping[str, nn.Module]
                        ) -> tuple[list[str], list[str]]:  # fmt: skip
    """The layers of a tower's blocks that give queries and values, and those to which no gradient goes back."""
    blocks = [b.path for b in tower.blocks]
    inside = {path: m for path, m in linears.items() if under(path, blocks)}
    layers = {path: m for path, m in inside.items() if is_linear(m)}
    known = queries_and_values(layers, wrappers(model, layers))
    known += [path for path in inside if path not in layers]  # torch's attentions
    severed = [path for path in known if under(path, anatomy.severed)]
    return [path for path in known if path not in severed], severed


def _all_linear(model: nn.Module, anatomy: Anatomy, tower: Tower, linears: Mapping[str, nn.Module]) -> list[str]:
    """Every linear layer of a tower's blocks that is called and has a gradient; ValueError if there is none."""
    blocks = [b.path for b in tower.blocks]
    found = [path for path in linears if under(path, blocks) and not under(path, anatomy.severed)]
    found = [path for path in found if _reader(model, path) is None]
    if not found:
        raise ValueError(
            f"lora: the blocks of tower {tower.name!r} have no linear layer that could get an update: leave the tower "
            f"out: towers {[t.name for t in anatomy.towers if t is not tower]}, or tune it in another way"
        )
    return found


def _reader(model: nn.Module, path: str) -> str | None:
    """What reads the weight of a layer without calling it, in words; None if the layer is called."""
    at, _, name = path.rpartition(".")
    owner = model.get_submodule(at)
    if isinstance(owner, nn.MultiheadAttention):
        return "an nn.MultiheadAttention"
    mixer = {"A_log", "D"} <= owner._parameters.keys()  # of a selective state space
    return f"a {type(owner).__name__}" if mixer and name in READ_BY_MIXERS else None


def _all_named(targets: tuple[str, ...], paths: list[str]) -> None:
    """ValueError for a target that is the end of no path."""
    for target in targets or ("",):
        if not any(_ends(path, target) for path in paths):
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise ValueError(f"lora: no layer of the towers has this name: {unknown('target', target, names)}")


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _every_name(model: nn.Module, first: Mapping[int, str]) -> Iterator[tuple[str, nn.Module]]:
    """(path, layer) of layers, known by their id with their plain path, under this and every other of their names."""
    own = set(first.values())
    for path, module in plain_modules(model):
        if id(module) in first:
            yield path, module
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in first and path not in own:
            yield path, module


def _places(model: nn.Module, chosen: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Path -> the other paths of the same layer."""
    first = {id(m): p for p, m in chosen.items()}
    places: dict[str, list[str]] = {p: [] for p in chosen}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in first and path != first[id(module)]:
            places[first[id(module)]].append(path)
    return places


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules inside which a path lies, the model first."""
    parts = path.split(".")
    return (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))


def _called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing. In evaluation an `nn.TransformerEncoderLayer` reads its layers' weights in one fused
    operation, without what LoRA adds; it calls the layers if one of them has a hook."""

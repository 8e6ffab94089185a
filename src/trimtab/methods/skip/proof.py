"""Proof that a configuration stands for a model: its class is built from it, and compared part by part.

A model that became shorter is believed only when its class, built from the new configuration on the meta device, has
the same modules, tensors and plain settings, and when the weights load into it without one missing or left over.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_KIND = "class"  # the fact that is no attribute: which class a module has


@dataclass(frozen=True)
class Cut:
    """What happens to one list of blocks: its path, how many blocks it had, and the numbers of those that are kept."""

    path: str
    count: int
    kept: tuple[int, ...]


class Difference(NamedTuple):
    """One fact that a model and its class, built from a configuration, do not share; None for what is not there."""

    path: str
    key: str
    own: Any
    built: Any

    def __str__(self) -> str:
        name = f"'{self.path}'.{self.key}" if self.path else self.key
        if self.own is None:
            return f"{name} is not in this model, and there {self.built}"
        return f"{name} is {self.own}, and there {'missing' if self.built is None else self.built}"


class Promise:
    """What a model's configuration decides of it now, to be asked again when it has become shorter.

    A plain setting is compared only if the configuration decides it now: what was set by hand is nobody's promise.
    Tensors are compared by name and shape without exception.

    Args:
        model: before anything is changed.
        base: its class, built from its configuration.
        cuts: what will be done.

    Attributes:
        numbers: (path of a list, path in its blocks, attribute) -> first value, of attributes that number the blocks.
    """

    def __init__(self, model: nn.Module, base: nn.Module, cuts: Sequence[Cut]):
        self.base = {path: facts(m) for path, m in base.named_modules()}
        self.configs = {path: m.config for path, m in base.named_modules() if _has_config(m)}
        self.was = {id(m): path for path, m in model.named_modules()}
        self.held: dict[int, set[str]] = {}
        for path, module in model.named_modules():
            known = self.base.get(path, {})
            self.held[id(module)] = {k for k, v in facts(module).items() if k in known and known[k] == v}
        self.numbers = {cut.path: numbers(base, cut) for cut in cuts}

    def differences(self, model: nn.Module, fresh: nn.Module, cuts: Sequence[Cut]) -> Iterator[Difference]:
        """All facts in which the model as it is now differs from `fresh`, but for the blocks' own numbers."""
        own, built = dict(model.named_modules()), dict(fresh.named_modules())
        for path in sorted(own.keys() | built.keys()):
            if path not in own or path not in built:
                for name, shape in tensors(own[path] if path in own else built[path]).items():
                    yield Difference(path, name, *((shape, None) if path in own else (None, shape)))
                continue
            if "drop" in path.rpartition(".")[2]:
                continue  # a rate of dropout by number, with which it is the one class or the other (BEiT's drop path)
            here, there = facts(own[path]), facts(built[path])
            shapes = {*tensors(own[path]), *tensors(built[path])}
            numbers = self._numbers_at(path, cuts)
            for key in sorted((self.held.get(id(own[path]), set()) | shapes) - numbers):
                if here.get(key) != there.get(key):
                    yield Difference(path, key, here.get(key), there.get(key))

    def _numbers_at(self, path: str, cuts: Sequence[Cut]) -> set[str]:
        cut, rest = _inside(path, cuts)
        return set() if cut is None else {k for inner, k in self.numbers[cut.path] if inner == rest.partition(".")[2]}


def set_numbers(model: nn.Module, cut: Cut, numbers: dict[tuple[str, str], int]) -> None:
    """Number the blocks of a list that was cut without gaps, under whatever name their modules keep the number."""
    for new, block in enumerate(model.get_submodule(cut.path).children()):
        parts = dict(block.named_modules())
        for (inner, key), first in numbers.items():
            if inner in parts and type(vars(parts[inner]).get(key)) is int:
                setattr(parts[inner], key, first + new)


def _inside(path: str, cuts: Sequence[Cut]) -> tuple[Cut | None, str]:
    """The list that a module stands in, and its path from there."""
    for cut in cuts:
        if path.startswith(f"{cut.path}."):
            return cut, path[len(cut.path) + 1 :]
    return None, ""


def within(path: str, cuts: Sequence[Cut]) -> bool:
    """Whether a module stands in one of the lists."""
    return _inside(path, cuts)[0] is not None


def numbers(base: nn.Module, cut: Cut) -> dict[tuple[str, str], int]:
    """Attributes that count up by one from block to block, and are called so: `layer_idx`, `layer_id`, `block_idx`."""
    seen: dict[str, list[tuple[str, int, int]]] = {}
    for i, block in enumerate(base.get_submodule(cut.path).children()):
        for inner, module in block.named_modules():
            for key, value in vars(module).items():
                if type(value) is int and any(w in key for w in ("idx", "index", "_id", "number", "layer_n")):
                    seen.setdefault(key, []).append((inner, i, value))
    # Blocks of several kinds keep it in parts of several names: what counts is that all go up together.
    return {
        (inner, key): value - i
        for key, found in seen.items()
        if len({i for _, i, _ in found}) > 1 and len({value - i for _, i, value in found}) == 1
        for inner, i, value in found
    }


# --- what is compared -------------------------------------------------------------------------------------------------


def tensors(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters and buffers."""
    return {n: tuple(t.shape) for n, t in {**module._parameters, **module._buffers}.items() if t is not None}


def facts(module: nn.Module) -> dict[str, Any]:
    """Class, shapes of its own tensors, and plain settings of a module, without rates of dropout (of layers of the
    first, too)."""
    found: dict[str, Any] = {**tensors(module), _KIND: type(module).__name__}
    for key, value in vars(module).items():
        if not key.startswith("_") and key != "training" and "drop" not in key and _plain(value):
            found[key] = list(value) if isinstance(value, tuple) else value
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))


def _has_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "to_dict")


# --- building and loading ---------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and bars of trials, which come to nothing or are told as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def build(model: nn.Module, config: Any) -> tuple[nn.Module | None, str]:
    """The model's class, built from a configuration without data; None if that fails, and why."""
    try:
        with quiet(), torch.device("meta"):
            return type(model)(config), ""
    except Exception as error:  # whatever a class does with settings that do not go together
        return None, f"{type(error).__name__}: {error}"


def loaded(model: Any, config: Any) -> nn.Module:
    """The model as `from_pretrained` makes it from its weights and this configuration; it shares the weights' memory.

    For as long as it loads, the weights are there twice: some classes write into what they load (Chinese-CLIP sets the
    word of padding to zero).

    Raises:
        ValueError: if a weight is missing, left over, of another shape, or arrives with other values; or if a tensor
            that is not stored comes out with other values.
    """
    name, state = type(model).__name__, model.state_dict()
    if not hasattr(type(model), "from_pretrained"):
        return _assigned(model, config)
    # As `save_pretrained` writes: a tied weight once.
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    copies = {k: v.clone() for k, v in state.items() if k not in tied or not _shared(v, state.get(tied[k]))}
    options: dict[str, Any] = {"dtype": model.dtype}
    device = next(model.parameters()).device
    if device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        with quiet():
            again, told = type(model).from_pretrained(
                None, config=config, state_dict=copies, output_loading_info=True, **options
            )
    except Exception as error:
        raise ValueError(
            f"shorten: the weights do not load into a {name} of the shortened configuration "
            f"({type(error).__name__}: {error}); nothing was changed"
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if left := sorted(map(str, told.get(what) or ())):
            raise ValueError(
                f"shorten: loaded again, the {name} has {what.replace('_', ' ')} ('{left[0]}', ...); nothing was "
                "changed"
            )
    for key, value in again.state_dict().items():
        if key not in state or not same(value, state[key].to(value.dtype)):
            raise ValueError(
                f"shorten: loaded again, '{key}' has other values: the {name} does not load what was saved; nothing "
                "was changed"
            )
    again.load_state_dict(state, assign=True)  # the same precision for each, whatever a part was cast to
    _same_buffers(model, again)
    return again.eval()


def _shared(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors are one in memory."""
    return b is not None and a.shape == b.shape and a.data_ptr() == b.data_ptr()


def _assigned(model: nn.Module, config: Any) -> nn.Module:
    """`loaded` for a class that only torch loads."""
    again, why = build(model, config)
    if again is None:
        raise ValueError(f"shorten: no {type(model).__name__} can be built from the shortened configuration ({why})")
    again.load_state_dict(model.state_dict(), assign=True)
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            again.get_submodule(path)._buffers[name] = module._buffers[name]
    return again.eval()


def _same_buffers(model: nn.Module, again: nn.Module) -> None:
    """Compare the tensors that are not stored, and take the model's own, which may be rounded by a cast.

    Raises:
        ValueError: if one has other values.
    """
    theirs = dict(again.named_buffers())
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            key, own = f"{path}.{name}".lstrip("."), module._buffers.get(name)
            if own is None or (other := theirs.get(key)) is None:
                continue
            other = other.to(own)
            if own.shape != other.shape or not torch.allclose(own.float(), other.float(), 2e-2, equal_nan=True):
                raise ValueError(f"shorten: loaded again, '{key}', which is not stored, has other values; nothing was "
                                 "changed")  # fmt: skip
            again.get_submodule(path)._buffers[name] = own


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, with NaN equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def has_values(model: nn.Module) -> bool:
    """Whether a model's weights are there, and not their sizes alone (meta, fake)."""
    return not any(isinstance(p, FakeTensor) or p.device.type == "meta" for p in model.parameters())

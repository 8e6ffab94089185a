"""One rule for what evaluates while an adapted model trains: dropout and running statistics of frozen parts are off.

A module of the plain model is in training mode if every weight below it is trained, and in evaluation mode otherwise: a
layer of which only a bias, a norm or an update beside it is trained drops nothing, whichever method trains them. What a
method added is in training mode if it is trained itself.

    full                      on everywhere
    partial                   on in the blocks that are trained
    BitFit, norms, LoRA,      off in the plain model; on in what they added (LoRA's own dropout)
    adapters, prompts, sides

Three kinds of modules keep their training mode though parts below them are frozen: the model itself, which was told to
train; modules that say that they augment what goes through them (`augments = True`: VSE's size augmentation); layers
with gradient checkpointing, which transformers checkpoints only in training mode, but not in towers that keep no graph
(`graphless`): checkpointing there only costs, and T5 then makes a graph of its own. The shares of dropout that these
apply themselves (`self.dropout`, a number) are 0 meanwhile. The model itself says so between its passes alone: in a
pass it is in evaluation mode as its parts are, which may count on the same (RF-DETR's groups of queries).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from trimtab.anatomy.structure import plain_modules

_IDLE = "_trimtab_idle"  # attribute of a model: names of parameters that were frozen because no loss reaches them
_QUIET = "_trimtab_quiet"  # attribute of a model that trains: its passes are in evaluation mode; True in one
_GRAPHLESS = "_trimtab_graphless"  # attribute of a block through which no gradient passes: it is not checkpointed
_SHARES = "_trimtab_shares"  # attribute of a module: its own shares of dropout, where they are 0 for the time being


def note_idle(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Remember parameters that were frozen only because no loss reaches them: the rest is trained as if they were."""
    known = {id(p) for p in parameters}
    names = {name for name, p in model.named_parameters() if id(p) in known}
    vars(model)[_IDLE] = vars(model).get(_IDLE, frozenset()) | names


def graphless(module: nn.Module, yes: bool = True) -> None:
    """Note that no gradient passes through a block (or that one does), so that it has no use for checkpointing."""
    vars(module).pop(_GRAPHLESS, None)
    if yes:
        vars(module)[_GRAPHLESS] = True


def frozen_in_evaluation(model: nn.Module) -> None:
    """Set the mode of every module of a model that trains, by the rule above."""
    drop_again(model)
    plain = {id(m) for _, m in plain_modules(model)}
    idle = {id(p) for m in model.modules() for name in vars(m).get(_IDLE, ()) for p in [_at(m, name)] if p is not None}
    _walk(model, _Counts(plain, idle), model, True, False, False)


def drop_again(model: nn.Module) -> None:
    """Give every module its own shares of dropout back."""
    for module in model.modules():
        vars(module).pop(_QUIET, None)
        for name, share in vars(module).pop(_SHARES, {}).items():
            setattr(module, name, share)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode in which it was, with the shares of dropout that it had."""
    was = [(m, m.training, {k: vars(m)[k] for k in (_QUIET, _SHARES) if k in vars(m)}) for m in model.modules()]
    try:
        yield
    finally:
        drop_again(model)
        for module, training, noted in was:
            module.training = training
            vars(module).update(noted)
            vars(module).update(dict.fromkeys(noted.get(_SHARES, ()), 0.0))


def _quiet_in_passes(model: nn.Module) -> None:
    """Let a model that trains be in evaluation mode during its passes."""
    vars(model)[_QUIET] = False
    if _before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before)
        model.register_forward_hook(_after, always_call=True)


def loud_again(model: nn.Module) -> None:
    """Take off what `frozen_in_evaluation` hooks on a model."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if hook in (_before, _after)]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)


def _before(model: nn.Module, args: tuple) -> None:
    if _QUIET in vars(model) and model.training:
        model.training, vars(model)[_QUIET] = False, True


def _after(model: nn.Module, args: tuple, out: object) -> None:
    if vars(model).get(_QUIET):
        model.training, vars(model)[_QUIET] = True, False


class _Counts:
    """Of each module: whether plain weights below it are trained, whether some are frozen, whether added ones train."""

    def __init__(self, plain: Collection[int], idle: Collection[int]):
        self.plain, self.idle = plain, idle
        self.known: dict[int, tuple[bool, bool, bool]] = {}

    def __call__(self, module: nn.Module) -> tuple[bool, bool, bool]:
        if id(module) in self.known:
            return self.known[id(module)]
        own = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
        own = [p for p in own if p.requires_grad or id(p) not in self.idle]
        trained, frozen = (any(p.requires_grad == needed for p in own) for needed in (True, False))
        found = [(trained, frozen, False) if id(module) in self.plain else (False, False, trained)]
        found += [self(child) for child in module.children()]
        self.known[id(module)] = tuple(map(any, zip(*found, strict=True)))  # type: ignore[assignment]
        return self.known[id(module)]


def _walk(module: nn.Module, counts: _Counts, root: nn.Module, on: bool, adds: bool, still: bool) -> None:
    """Set the mode of a module and of what is below it.

    Args:
        module: where to begin.
        counts: of what is trained.
        root: keeps its training mode.
        on: whether the plain module around is in training mode; modules without weights follow it.
        adds: whether the module around trains something that was added.
        still: whether no gradient passes through the module around.
    """
    still = still or vars(module).get(_GRAPHLESS, False)
    trained, frozen, added = counts(module)
    if id(module) in counts.plain:
        on = trained and not frozen if trained or frozen else on
        module.training = on
        asks = ("augments",) if still else ("augments", "gradient_checkpointing")
        keeps = any(getattr(module, name, False) is True for name in asks)
        if not on and (keeps or module is root):
            module.training = True
            if not keeps:
                _quiet_in_passes(module)
            shares = {n: v for n, v in vars(module).items() if "drop" in n and isinstance(v, float) and 0 < v <= 1}
            vars(module)[_SHARES] = shares
            vars(module).update(dict.fromkeys(shares, 0.0))
    else:
        added = added or (adds and not any(True for _ in module.parameters()))
        module.training = added
    for child in module.children():
        _walk(child, counts, root, on, added, still)


def _at(model: nn.Module, name: str) -> nn.Parameter | None:
    owner, _, last = name.rpartition(".")
    try:
        return model.get_submodule(owner)._parameters.get(last)
    except AttributeError:
        return None

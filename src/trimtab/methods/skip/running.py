"""A shortened model against the whole one with these blocks passed by: outputs, and what is written with a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.anatomy.calls import arguments
from trimtab.methods.fitting import evaluating
from trimtab.methods.skip.proof import Cut, quiet, same
from trimtab.randomness import drawn_aside

Seen = dict[str, Tensor]


class NotRun(ValueError):
    """An example does not run through what is to be compared."""


class Passed:
    """What a model puts out with some blocks passed by: each runs, and its stream goes on as it came in.

    Args:
        outputs: of one forward pass, by the path in what the model returns.
        words: logits of some generated tokens, made with the cache; None if the model writes none.
    """

    def __init__(self, outputs: Seen, words: Tensor | None):
        self.outputs, self.words = outputs, words


def pass_by(model: nn.Module, gone: Collection[str], example: Mapping[str, Any], empty: Collection[str] = ()
            ) -> Passed:  # fmt: skip
    """Run a model with some of its blocks passed by.

    Args:
        model: the whole model.
        gone: paths of the blocks.
        example: keyword arguments of the model.
        empty: paths of what stands in place of blocks that are gone already.

    Raises:
        NotRun: if the model or a block does not run on the example.
        ValueError: if a block hands on no stream of the shape that came in.
    """
    try:
        run(model, example)
    except Exception as error:
        raise NotRun(
            f"shorten: the model does not run on the example, which gives {', '.join(example)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    calls = dict.fromkeys((*gone, *empty), 0)
    with _around(model, calls, empty):
        outputs = run(model, example)
        for path, count in calls.items():
            if not count:
                raise NotRun(
                    f"shorten: the example does not run '{path}': it gives {', '.join(example)}; give what the "
                    "model's tower with that block reads too"
                )
        return Passed(outputs, try_write(model, example))


@contextmanager
def _around(model: nn.Module, calls: dict[str, int], empty: Collection[str]) -> Iterator[None]:
    blocks = {path: model.get_submodule(path) for path in calls}
    had: dict[str, Any] = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    for path, block in blocks.items():
        block.forward = _passing(block, path, calls, path in empty)
    try:
        yield
    finally:
        for path, block in blocks.items():
            if had[path] is None:
                del block.forward
            else:
                block.forward = had[path]


def _passing(block: nn.Module, path: str, calls: dict[str, int], empty: bool) -> Callable:
    """The block's forward, in whose result every tensor of a stream is the one that came in; its own where nothing but
    the stream is handed on."""
    forward = block.forward

    @functools.wraps(forward)
    def passing(*args: Any, **kwargs: Any) -> Any:
        calls[path] += 1
        if empty:
            return forward(*args, **kwargs)
        given = [*args, *arguments(block, args, kwargs).values()]
        # Copies: some blocks write into what they are given.
        came = [v.clone() for v in given if isinstance(v, Tensor) and v.is_floating_point()]
        out = forward(*args, **kwargs)
        first = next((t for _, t in _leaves(out, "")), None)
        if first is None or _came(first, came) is first:
            raise ValueError(
                f"shorten: '{path}' ({type(block).__name__}) cannot be taken out: expected a stream that keeps its "
                f"shape, found {'nothing' if first is None else tuple(first.shape)} from "
                f"{[tuple(t.shape) for t in came]}"
            )
        return _came(out, came)

    return passing


def _came(part: Any, came: list[Tensor]) -> Any:
    """Something that a block hands on, with what came in of the same shape in place of what it has made."""
    if isinstance(part, Tensor):
        return next((t for t in came if t.shape == part.shape and t.dtype == part.dtype), part)
    if isinstance(part, Mapping):  # `ModelOutput` among them
        return type(part)(**{name: _came(value, came) for name, value in part.items()})
    if type(part) in (tuple, list):
        return type(part)(_came(value, came) for value in part)
    return part


# --- runs -------------------------------------------------------------------------------------------------------------


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """In evaluation, without gradients, and with the same draws in every run."""
    with evaluating(model), quiet(), torch.no_grad(), drawn_aside(seed=0):
        yield


def run(model: nn.Module, example: Mapping[str, Any]) -> Seen:
    """All tensors that one forward pass returns, by their path in what it returns."""
    with _calm(model):
        out = model(**_copied(example))
    return {name: t.clone() for name, t in _leaves(out, "")}


def _copied(example: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of one run: some models write into them (BLIP's generation sets the first word)."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in example.items()}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "output", value
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (tuple, list)):
        items = ((f"{i} of {len(value)}", v) for i, v in enumerate(value))
    for name, inner in items:
        yield from _leaves(inner, f"{path}.{name}".lstrip("."))


def write(model: Any, example: Mapping[str, Any], count: int = 3) -> Tensor | None:
    """Logits of some tokens that a model writes with its cache, (count, B, V); None if it writes none."""
    can = getattr(type(model), "can_generate", None)
    if can is None or not can():
        return None
    given = {k: v for k, v in _copied(example).items() if k != "labels" and not k.startswith("decoder_")}
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "use_cache": True}
    with _calm(model):
        out = model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    return torch.stack(out.logits)


def try_write(model: nn.Module, example: Mapping[str, Any]) -> Tensor | None:
    """As `write`; None too if the model cannot go on from this example."""
    try:
        return write(model, example)
    except Exception:  # generation asks for more than a forward pass does
        return None


# --- comparisons ------------------------------------------------------------------------------------------------------


def differs_from_passed(model: nn.Module, example: Mapping[str, Any], passed: Passed, cuts: list[Cut]) -> str:
    """In what a shortened model differs from the one with its blocks passed by; empty if in nothing."""
    doing = "run"
    try:
        outputs = run(model, example)
        doing = "generate with its cache"
        words = None if passed.words is None else write(model, example)
    except Exception as error:
        return f"it does not {doing} ({type(error).__name__}: {error})"
    known = [name for name in outputs if name in passed.outputs]
    if not known:
        return "it returns nothing of what it returned before"
    for name in known:
        if not _agree(outputs[name], passed.outputs[name], cuts):
            return f"its '{name}' is another than with the blocks passed by"
    if passed.words is not None and (words is None or not same(words, passed.words)):
        return "what it generates with its cache is another than with the blocks passed by"
    return ""


def _agree(short: Tensor, long: Tensor, cuts: list[Cut]) -> bool:
    """Whether two outputs are equal; one that has an entry for each block has fewer in the shortened model."""
    if short.shape == long.shape:
        return same(short, long)
    for cut in cuts:
        for axis in range(min(short.ndim, long.ndim)):
            if long.shape[axis] == cut.count:
                picked = long.index_select(axis, torch.tensor(cut.kept, device=long.device))
                if picked.shape == short.shape and same(picked, short):
                    return True
    return False


def differs_from_loaded(model: nn.Module, again: nn.Module, example: Mapping[str, Any]) -> str:
    """In what a model and the one that was loaded from its weights differ; empty if in nothing."""
    own, theirs = run(model, example), run(again, example)
    for name in own.keys() | theirs.keys():
        if name not in own or name not in theirs or not same(own[name], theirs[name]):
            if name in own and not same(run(model, example)[name], own[name]):
                return f"the model does not compute '{name}' twice in the same way"
            return f"its '{name}' is another"
    words = try_write(model, example)
    if words is not None and not same(words, write(again, example)):  # type: ignore[arg-type]
        return "what it generates with its cache is another"
    return ""


# --- an example from a configuration ----------------------------------------------------------------------------------


def own_example(model: Any) -> dict[str, Tensor] | None:
    """Words, or a picture, or both, of a transformers model, if it runs on no more than these; else None."""
    config = model.config
    device = next(model.parameters()).device
    parts: dict[str, Tensor] = {}
    words = getattr(getattr(config, "text_config", None) or config, "vocab_size", None)
    if isinstance(words, int) and words > 8:
        special = {v for k, v in vars(config).items() if k.endswith(("_token_id", "_token_index")) and type(v) is int}
        plain = [i for i in range(min(words, 200)) if i not in special] or [0]
        parts["input_ids"] = torch.tensor([[plain[(7 * i + 3) % len(plain)] for i in range(8)]], device=device)
        if getattr(config, "is_encoder_decoder", False):
            parts["decoder_input_ids"] = parts["input_ids"][:, :5]
    seen = getattr(config, "vision_config", None) or config
    if isinstance(size := getattr(seen, "image_size", None), (int, list, tuple)):
        height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
        shape = (1, getattr(seen, "num_channels", 3), height, width)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        parts["pixel_values"] = noise.to(device, getattr(model, "dtype", torch.float32))
    without = {k: v for k, v in parts.items() if k != "pixel_values"}
    for example in (parts, without, {k: v for k, v in parts.items() if k == "pixel_values"}):
        if not example:
            continue
        try:
            run(model, example)
        except Exception:  # it asks for more, or for less
            continue
        return example
    return None

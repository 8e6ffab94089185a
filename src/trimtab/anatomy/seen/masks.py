"""Where a tower's mask of valid tokens is seen, and why a tower without one may hide tokens all the same."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.anatomy.parts import Tap
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.order import hidden, sense, shows
from trimtab.anatomy.seen.probe import Sight
from trimtab.anatomy.seen.record import Call, Example, Recording, Trace
from trimtab.anatomy.seen.towers import numbers


def mask_of(recording: Recording, masks: Collection[str], links: Sequence[Link], acting: Sequence[str],
            sights: Sequence[Sight], leak: str) -> tuple[Tap | None, Tensor | None, str]:  # fmt: skip
    """Where a tower's mask is seen; which tokens of the example are valid by it, (B, L); why it is not known.

    Args:
        recording: of the pass.
        masks: inputs that may be masks.
        links: the tower's blocks.
        acting: those of the masks that reach them.
        sights: who sees whom in the blocks; none if that was not looked at.
        leak: why the acting masks do not hide what is 0 in them; empty if they do.
    """
    found = _place(recording, masks, links, acting) or _of_pairs(recording, masks, links, acting)
    if found is None:
        tap, valid = _of_some(recording, masks, links, acting, sights)
        if tap is not None and not leak:
            return tap, valid, ""
        why = (
            f"{' and '.join(acting)} act in it, but no argument around its blocks has one number a token "
            f"({links[0].stream.shape[:2]})"
        )
        return None, None, leak or why
    tap, value = found
    value = value.flatten(1)
    fits = value.shape == links[0].stream.shape[:2] and all(s.moves.shape[:2] in ((0,), value.shape) for s in sights)
    kind = sense(sights, value) if fits else "valid"
    if kind == "padding" and not tap.pairs:
        return replace(tap, padding=True), value == 0, ""
    if leak:
        return None, None, leak
    if tap.pairs and not shows(sights, value):  # True may stand for either, so that it has to show
        where = f"{tap.key!r} of {tap.path or 'the model'}"
        return None, None, f"{where} is a mask of pairs, and who sees whom does not show what it hides"
    if not kind:
        row, place = hidden(sights, value != 0) or (0, 0)
        return None, None, (
            f"{tap.key!r} of {tap.path or 'the model'} is {value[row, place].item()} at token {place} of row {row}, "
            "which does not agree with whether others see it"
        )  # fmt: skip
    return tap, value != 0, ""


def _around(recording: Recording, links: Sequence[Link]) -> Iterator[tuple[Call, str, Trace]]:
    """The arguments of the modules around a tower's blocks, from the outermost, and of its first block."""
    blocks = [link.path for link in links]
    for call in recording.calls:
        if call is links[0].call or any(b.startswith(f"{call.path}.") or not call.path for b in blocks):
            for name, traces in call.given.items():
                if len(traces) == 1:
                    yield call, name, traces[0]


def _of_pairs(
    recording: Recording, masks: Collection[str], links: Sequence[Link], acting: Sequence[str]
) -> tuple[Tap, Tensor] | None:
    """The outermost mask of pairs, (B, 1, L, L), that is the same for every token that looks and in every block, and
    which tokens are seen by it, (B, L)."""
    rows, tokens = (*links[0].stream.shape, 0, 0)[:2]
    for call, name, trace in _around(recording, links):
        value = trace.value
        if value is None or trace.shape != (rows, 1, tokens, tokens) or not _told(recording, masks, trace, acting):
            continue
        every = [link.call.given.get(name, ()) for link in links] if call is links[0].call else []
        same = all(len(ts) == 1 and ts[0].value is not None and torch.equal(ts[0].value, value) for ts in every)
        if same and bool((value == value[:, :, :1]).all()):
            row = value[:, 0, 0]
            return Tap(call.path, "input", name, pairs=True), row if row.dtype is torch.bool else row == 0
    return None


def _of_some(recording: Recording, masks: Collection[str], links: Sequence[Link], acting: Sequence[str],
             sights: Sequence[Sight]) -> tuple[Tap | None, Tensor | None]:  # fmt: skip
    """The outermost mask with a number for some of the tokens alone, where it shows in who sees whom that these come
    first or last, and that the rest are seen; and which tokens are valid by it, (B, L)."""
    rows, tokens = (*links[0].stream.shape, 0, 0)[:2]
    for call, name, trace in _around(recording, links):
        value = trace.value
        short = value is not None and value.ndim == 2 and len(value) == rows and 0 < value.shape[1] < tokens
        if value is None or not short or not _told(recording, masks, trace, acting):
            continue
        taps = [Tap(call.path, "input", name, rest=where) for where in ("before", "after")]  # type: ignore[arg-type]
        shown = [(tap, whole) for tap in taps if shows(sights, whole := tap.whole(value, tokens) != 0)]
        if len(shown) == 1:
            return shown[0]
    return None, None


def untold(example: Example, others: Collection[str], links: Sequence[Link], sights: Sequence[Sight]) -> str:
    """Why a tower that no mask reaches may have one all the same.

    Args:
        example: with which the model was run.
        others: keys of inputs that are no masks and reach the blocks beside the stream alone.
        links: the tower's blocks.
        sights: who sees whom in them.
    """
    if (at := hidden(sights)) is not None:
        return (
            f"no other token sees token {at[1]} of row {at[0]}, and no input of the example is a mask, (rows, tokens) "
            "of 0 and 1, that says so; give one, or describe where the mask is"
        )
    stream = links[0].stream.shape
    for key in others if any(s.mixes for s in sights) else ():
        value = example[key]
        if not isinstance(value, Tensor) or not value.ndim or len(value) != stream[0]:
            continue
        if value.ndim == 1 or (value.is_floating_point() and value.shape[-1] == stream[1]):
            return (
                f"{key} {tuple(value.shape)} reaches its blocks beside the stream and may hide tokens; give a mask, "
                "(rows, tokens) of 0 and 1, or describe where the mask is"
            )
    return ""


def _place(
    recording: Recording, masks: Collection[str], links: Sequence[Link], acting: Sequence[str]
) -> tuple[Tap, Tensor] | None:
    """The outermost place with one number a token of the stream, and what stood there."""
    shape, blocks = links[0].stream.shape, [link.path for link in links]
    for call in recording.calls:
        if not any(b.startswith(f"{call.path}.") or not call.path for b in blocks):
            continue
        for name, traces in call.given.items():
            if len(traces) == 1 and (value := _mask(recording, masks, traces[0], shape, acting)) is not None:
                return Tap(call.path, "input", name, flat=len(traces[0].shape) > 2), value
    for call in recording.calls:
        for where, trace in call.made:
            before = len(where) == 1 and call.end < links[0].call.begin
            if before and (value := _mask(recording, masks, trace, shape, acting)) is not None:
                return Tap(call.path, key=where[0], flat=len(trace.shape) > 2), value
    return None


def _mask(recording: Recording, masks: Collection[str], trace: Trace, stream: tuple[int, ...],
          acting: Sequence[str]) -> Tensor | None:  # fmt: skip
    """What a tensor holds if it has one number a token of a stream, and comes from masks alone, or is only 0 and 1."""
    if len(stream) < 3 or trace.shape[:1] != stream[:1] or numbers(trace.shape) != stream[1]:
        return None
    return trace.value if _told(recording, masks, trace, acting) else None


def _told(recording: Recording, masks: Collection[str], trace: Trace, acting: Sequence[str]) -> bool:
    """Whether a tensor comes from masks that act, and from masks alone, or is only 0 and 1."""
    sources = {key for key, bit in recording.inputs.items() if trace.origins >> bit & 1}
    return not sources.isdisjoint(acting) and (sources <= set(masks) or trace.binary)

"""Blocks that run more than once in one pass: on what they made (ALBERT's), or on something else (one encoder for two
texts, or for pictures and words)."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence

from trimtab.anatomy.calls import arguments
from trimtab.anatomy.seen.chains import Link
from trimtab.anatomy.seen.record import Call, Recording


def repeats(recording: Recording, links: Sequence[Link]) -> str | None:
    """A block that runs again on what it has made."""
    for link, call in _further(recording, links):
        if call.begin > link.call.end and any(
            t.origins >> link.call.bit & 1 for traces in call.given.values() for t in traces
        ):
            return link.path
    return None


def brought(recording: Recording, links: Sequence[Link]) -> set[str]:
    """Keys of the inputs from which the streams of further calls were computed."""
    origins = 0
    for link, call in _further(recording, links):
        for trace in call.given.get(link.name, ()):
            origins |= trace.origins
    return {key for key, bit in recording.inputs.items() if origins >> bit & 1}


def otherwise(recording: Recording, links: Sequence[Link], masks: Collection[str]) -> str:
    """Why what one call tells of who sees whom does not hold of another: it gets other masks or settings."""
    for link, call in _further(recording, links):
        if _sight(recording, call, masks) != _sight(recording, link.call, masks):
            return (
                f"'{link.path}' runs again in one pass, with other masks or settings than before "
                f"({_words(recording, link.call, masks)}, then {_words(recording, call, masks)})"
            )
    return ""


def _further(recording: Recording, links: Sequence[Link]) -> Iterator[tuple[Link, Call]]:
    first = {link.path: link for link in links}
    for call in recording.calls:
        if (link := first.get(call.path)) is not None and call is not link.call:
            yield link, call


def _sight(recording: Recording, call: Call, masks: Collection[str]) -> Hashable:
    """What may decide who sees whom: the masks that reach a call, the tensors that it gets, settings."""
    plain = {} if call.held is None else arguments(call.module, *call.held)
    settings = frozenset((k, v) for k, v in plain.items() if isinstance(v, (bool, str)))
    return frozenset(_masks(recording, call, masks)), frozenset(call.given), settings


def _masks(recording: Recording, call: Call, masks: Collection[str]) -> list[str]:
    bits = {key: recording.inputs[key] for key in masks}
    return [k for k, bit in bits.items() if any(t.origins >> bit & 1 for ts in call.given.values() for t in ts)]


def _words(recording: Recording, call: Call, masks: Collection[str]) -> str:
    found = _masks(recording, call, masks)
    return f"{', '.join(call.given)} {'by ' + ' and '.join(found) if found else 'by no mask'}"

"""What who sees whom tells of a tower: which sense its mask has, and whether it is causal.

A side network and prompts let tokens see each other by a tower's mask and its order alone: all valid tokens, or those
before. Where a tower is seen to keep tokens apart in another way (documents in one row, words that do not see the
picture behind them, padding that no mask tells), that is said, and what needs the fact refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.anatomy.seen.probe import MANY, Sight, others


def sense(sights: Sequence[Sight], mask: Tensor) -> str:
    """Which numbers of a mask, (B, L), stand at tokens that are seen: `valid` if those that are not 0, `padding` if 0;
    empty if neither."""
    for name, valid in (("valid", mask != 0), ("padding", mask == 0)):
        if valid.any() and fits(sights, valid):
            return name
    return ""


def fits(sights: Sequence[Sight], valid: Tensor) -> bool:
    """Whether tokens that are valid, (B, L), are seen by others that are, and those that are not are not."""
    clear = [s for s in sights if s.clear]
    return not clear or len(clear) < sum(s.mixes for s in sights) or _hidden(clear, valid) is None


def shows(sights: Sequence[Sight], valid: Tensor) -> bool:
    """Whether it shows in who sees whom that these tokens are valid, (B, L), and not all: those that are not are hidden
    in every block in which tokens mix."""
    return hidden(sights) is not None and hidden(sights, valid) is None


def hidden(sights: Sequence[Sight], valid: Tensor | None = None) -> tuple[int, int] | None:
    """(row, place) of a token that no other sees, or that others see, against what is said to be valid, (B, L)."""
    clear = [s for s in sights if s.clear]
    if not clear or len(clear) < sum(s.mixes for s in sights):
        return None
    return _hidden(clear, torch.ones(clear[0].moves.shape[:2], dtype=torch.bool) if valid is None else valid)


def _hidden(mixing: Sequence[Sight], valid: Tensor) -> tuple[int, int] | None:
    valid, mixing = valid.to("cpu"), [s for s in mixing if s.moves.shape == mixing[0].moves.shape]
    if valid.shape != mixing[0].moves.shape[:2]:
        return None  # stages of other numbers of tokens
    for row, own in enumerate(valid):
        places = own.nonzero().flatten().tolist()
        for i, place in enumerate(mixing[0].places):
            beside = own.clone()
            beside[place] = False
            if own[place] and place != places[-1]:  # nothing comes after the last, which might see it
                if not any(bool(s.stirs[row, beside, i].any()) for s in mixing):
                    return row, place
            elif not own[place] and any(bool(s.moves[row, beside, i].any()) for s in mixing):
                return row, place
    return None


def order(sights: Sequence[Sight], valid: Tensor | None, picture: bool) -> tuple[bool, str]:
    """Whether a token sees only those before it, in every block in which tokens mix; and why it cannot be told.

    Args:
        sights: of the tower's blocks, in their order.
        valid: tokens that are not hidden, (B, L); None for all.
        picture: whether the tokens are those of pictures alone, which windows may keep apart.
    """
    mixing = [s for s in sights if s.mixes]
    if not mixing:
        return False, ""
    shapes = {s.moves.shape for s in mixing}
    if valid is not None and any(shape[:2] != valid.shape for shape in shapes):
        valid = None  # stages of another number of tokens, of which the mask tells nothing
    causal = not any(_back(s, valid) for s in mixing)
    if not all(s.clear for s in mixing):
        return causal, ""
    if len(shapes) > 1 or mixing[0].moves.shape[1] > MANY:
        return causal, _apart(mixing[0], _pairs(mixing[:1], valid, 1), causal, True) if len(shapes) == 1 else ""
    reach = _pairs(mixing, valid, len(mixing))
    return causal, _apart(mixing[0], reach, causal, picture)


def _back(sight: Sight, valid: Tensor | None) -> bool:
    """Whether a token sees one that comes after it. The latest place decides at which tokens mix at all: of a prefix
    that sees all of itself the end is causal."""
    moves = others(sight)
    if valid is not None:
        moves = moves & valid.to("cpu")[:, :, None]
    length = moves.shape[1]
    for i, place in sorted(enumerate(sight.places), key=lambda at: -at[1]):
        if 0 < place < length - 1:
            if bool(moves[:, :place, i].any()):
                return True
            if bool(moves[:, place + 1 :, i].any()):
                return False
    return False


def _pairs(mixing: Sequence[Sight], valid: Tensor | None, blocks: int) -> Tensor:
    """Whether something goes from one of the places to another in a row, in a number of blocks, (B, places, places)."""
    places = list(mixing[0].places)
    once = torch.stack([s.stirs[:, places] for s in mixing]).any(0) | torch.eye(len(places), dtype=torch.bool)
    if valid is not None:
        own = valid.to("cpu")[:, places]
        once = once & own[:, None] & own[:, :, None]
    reach = once
    for _ in range(min(blocks, len(places)) - 1):
        reach = (reach.float() @ once.float()) > 0
    return reach


def _apart(sight: Sight, reach: Tensor, causal: bool, picture: bool) -> str:
    """Why tokens do not see each other as a mask and an order tell."""
    places = sight.places
    near = [i for i in range(len(places) - 1) if places[i + 1] == places[i] + 1]
    for row in reach:
        present = row.diagonal()
        one = row & ~row.T & present[:, None] & present
        if not causal and bool(one.any()):
            a, b = map(int, one.nonzero()[0])
            return (
                f"its tokens see each other neither in order nor all: token {places[b]} does not see token "
                f"{places[a]}, which sees it"
            )
        pairs = [(i, bool(row[i + 1, i])) for i in near if present[i] and present[i + 1]]
        if not picture and any(seen for _, seen in pairs) and (cut := [i for i, seen in pairs if not seen]):
            return f"token {places[cut[0] + 1]} does not see the one before it, as others do: there are groups in a row"
    return ""

"""The plan: what a search finds. A small JSON that can be printed, kept, used again and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.anatomy import Anatomy, Block
from trimtab.files import replace_file

FORMAT = 1


class PlanError(ValueError):
    """A plan that cannot be used: not a plan, or one of another model; the message says which file and what differs."""


@dataclass(frozen=True)
class PlanBlock:
    """A block that could be skipped.

    Attributes:
        path: dotted module path.
        tower: name of its tower.
        width: channels of its output.
        skipped: whether it is.
        score: what the search thinks of skipping it, larger for more redundant: DAS's gate, say. None if it has none.
        macs: multiply-adds of the block in one forward pass of the session's example (one sample in recipes), without
            adapters; None if not counted.
        saved: what skipping it saves of them, its adapters and the skip adapter counted.
    """

    path: str
    tower: str
    width: int
    skipped: bool
    score: float | None = None
    macs: int | None = None
    saved: int | None = None


@dataclass(frozen=True)
class Plan:
    """Which blocks of which model are skipped.

    Attributes:
        model: class of the model; with the blocks' paths and widths it tells whose plan this is.
        blocks: every block that could have been skipped, in the order of the search's indices.
        method: registered name of the search.
        target: what was asked for: a number of blocks, or a budget.
        dense_macs: of the whole model before any method.
        macs: of the whole model with the plan applied, adapters included.
        evaluations: how many plans the search evaluated.
    """

    model: str
    blocks: tuple[PlanBlock, ...]
    method: str = ""
    target: str = ""
    dense_macs: int | None = None
    macs: int | None = None
    evaluations: int = 0

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, candidates: Sequence[Block], skipped: Sequence[int],
           scores: Sequence[float] | None = None, **more: Any) -> Plan:  # fmt: skip
        """A plan for a model's candidate blocks, by their indices."""
        towers = {b.path: t.name for t in anatomy.towers for b in t.blocks}
        blocks = tuple(
            PlanBlock(b.path, towers[b.path], b.width, i in skipped, None if scores is None else round(scores[i], 6))
            for i, b in enumerate(candidates)
        )
        return cls(type(model).__name__, blocks, **more)

    @property
    def skipped(self) -> list[str]:
        return [b.path for b in self.blocks if b.skipped]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        out = {"format": FORMAT, **asdict(self), "skip": self.skipped, "candidates": [b.path for b in self.blocks]}
        out["blocks"] = [dict(b) for b in out["blocks"]]
        return out

    @classmethod
    def from_dict(cls, raw: Any, where: str = "plan") -> Plan:
        """The reverse of `to_dict`; further keys (a search's trace) are left out.

        Raises:
            PlanError: if it is no plan.
        """
        try:
            if raw["format"] != FORMAT:
                raise PlanError(f"{where}: a plan of format {raw['format']}, this version reads {FORMAT}")
            known = {f.name for f in fields(PlanBlock)}
            blocks = tuple(PlanBlock(**{k: v for k, v in b.items() if k in known}) for b in raw["blocks"])
            own = {f.name: raw[f.name] for f in fields(cls) if f.name in raw and f.name != "blocks"}
            return cls(blocks=blocks, **own)
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{where}: not a plan, which has 'format', 'model' and 'blocks' ({error!r})") from error

    def save(self, file: Path, **more: Any) -> None:
        """Write the JSON file; `more` is kept beside the plan (a trace, say)."""
        with replace_file(Path(file)) as partial:
            partial.write_text(json.dumps({**self.to_dict(), **more}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: str | Path) -> Plan:
        """The plan of a JSON file, or of a folder with a `fit.json` in which blocks are skipped.

        Raises:
            PlanError: if the file is not there or holds no plan.
        """
        raw, where = read_raw(file)
        return cls.from_dict(raw, where)

    def check(self, candidates: Sequence[Block], model: nn.Module, where: str = "plan") -> None:
        """Refuse the plan unless it was made for this model.

        Raises:
            PlanError: if the class, or the path or width of a block, is another; the first difference is named.
        """
        kind = type(model).__name__
        if kind != self.model:
            raise PlanError(f"{where}: made for a {self.model}, this is a {kind}; search again for this model")
        own = {b.path: b.width for b in candidates}
        for block in self.blocks:
            if block.path not in own and block.skipped:
                raise PlanError(
                    f"{where}: skips '{block.path}', which is no block of this {kind} that can be skipped (it has "
                    f"{len(own)}, the plan knows {len(self.blocks)}); search again for this model"
                )
            if own.get(block.path, block.width) != block.width:
                raise PlanError(
                    f"{where}: block '{block.path}' is {block.width} wide in the plan and {own[block.path]} in this "
                    f"{kind}: another size of the model; search again for this model"
                )
        theirs = {b.path for b in self.blocks}
        if more := [p for p in own if p not in theirs]:
            raise PlanError(
                f"{where}: knows {len(theirs)} blocks, this {kind} has {len(own)} ('{more[0]}' is not in the plan): "
                "made for another model or with other `towers`"
            )

    def table(self) -> Any:
        """A rich table: one row a block."""
        from rich.table import Table

        title = f"{self.method or 'plan'} for {self.model}: {len(self.skipped)} of {len(self.blocks)} blocks skipped"
        if self.dense_macs and self.macs:
            change = 100 * (self.macs / self.dense_macs - 1)
            title += f"; {self.macs / 1e6:,.1f} M MACs for {self.dense_macs / 1e6:,.1f} M ({change:+.1f} %)"
        table = Table(title=title, title_justify="left")
        for column in ("", "block", "tower", "MACs", "saved if skipped", "gate or score", "plan"):
            right = column in ("", "MACs", "saved if skipped", "gate or score")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        for i, b in enumerate(self.blocks):
            numbers = ["-" if v is None else f"{v:,}" for v in (b.macs, b.saved)]
            score = "-" if b.score is None else f"{b.score:+.4f}"
            table.add_row(str(i), b.path, b.tower, *numbers, score, "skipped" if b.skipped else "kept")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get()


def read_raw(file: str | Path) -> tuple[Any, str]:
    """A plan as it stands in a file or folder, with what is kept beside it (a search's trace), and where it was found.

    Raises:
        PlanError: if the file cannot be read, or a folder's `fit.json` tells of no skipped blocks.
    """
    file = Path(file)
    folder = file.is_dir()
    file = file / "fit.json" if folder else file
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"{file}: cannot be read as a plan: {error}") from error
    if not folder:
        return raw, str(file)
    methods = raw.get("methods", ()) if isinstance(raw, dict) else ()
    for method in methods:
        if method.get("lever") == "skip":
            return method.get("state"), f"{file}: {method.get('name')}"
    names = ", ".join(str(m.get("name")) for m in methods) or "no method"
    raise PlanError(f"{file}: no blocks are skipped there (found {names}): give a folder of a skipped model, or a plan")

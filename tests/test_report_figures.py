"""Figures of reports, and those of a sweep over sparsities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from trimtab.report import page as report
from trimtab.report.canvas import assign_styles
from trimtab.report.page import _tick_text
from trimtab.report.plots import Panel, Point, curve_figure, pareto_figure, pareto_front
from trimtab.report.runs import group_runs, load_runs
from trimtab.report.sparsity import sweep

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from tests.written_runs import write_fit, write_run


def test_figures_cope_with_odd_values() -> None:
    names = ["_$x", "a name without a single space that is longer than the panel is wide" * 2]
    styles = assign_styles(names)
    for xs in ((0, 0), (0, 5), (5, 5), (1, 1e9)):
        points = [Point(name, x, 0.5, x_error=x) for name, x in zip(names, xs, strict=True)]
        panels = [Panel("cost", points, str, log=log) for log in (True, False, True)]
        assert pareto_figure(panels, "score", styles).startswith(b"\x89PNG")
    curves = {names[0]: [{0: 1e3, 1: 0.1}, {1: 0.2}], names[1]: [{}]}
    assert curve_figure(curves, styles).startswith(b"\x89PNG")


def test_scores_of_runs_that_were_evaluated_while_they_trained_are_drawn(tmp_path: Path) -> None:
    for seed, steps in ((0, (50, 100)), (1, (50,))):
        file = write_run(tmp_path / "runs", "demo/retrieval", "full", seed) / "metrics.json"
        scores = [{"step": step, "recall@1": 0.1 + step / 200, "loss": 1.0} for step in steps]
        told = json.loads(file.read_text()) | {"validation": {"best_step": 50, "scores": scores}}
        file.write_text(json.dumps(told))
    (section,) = group_runs(load_runs([tmp_path / "runs"]))
    curves = [report._validation(run, section) for run in section.runs]
    assert curves == [pytest.approx({50: 35, 100: 60}), pytest.approx({50: 35})]  # in percent, as in the table
    report.write_report([tmp_path / "runs"], tmp_path / "out")
    assert (tmp_path / "out" / "demo-retrieval-validation.png").read_bytes().startswith(b"\x89PNG")
    report.write_report([tmp_path / "out" / "results.jsonl"], tmp_path / "again")  # which keeps scores
    assert [f.name for f in (tmp_path / "again").glob("*validation.png")] == ["demo-retrieval-validation.png"]


def test_pareto_front() -> None:
    points = [Point("dear", 3, 3), Point("beaten", 2, 1), Point("cheap", 1, 2), Point("tied", 1, 1)]
    assert [point.label for point in pareto_front(points)] == ["cheap", "dear"]


# --- sweeps over sparsities -------------------------------------------------------------------------------------------


def write_pruned(root: Path, pruner: str, sparsity: float, seed: int, seconds: float | None = 1.5) -> None:
    folder = write_run(root, "prune/retrieval", "full", seed, {"variant": f"{pruner}-{sparsity}"})
    towers = {
        "vision": {"prunable": 100, "kept": round(100 * (1 - sparsity))},
        "text": {"prunable": 50, "kept": 0 if pruner == "omp" else round(50 * (1 - sparsity))},
    }
    state = {"pruner": pruner, "sparsity": sparsity + 1e-4, "towers": towers, "seconds": seconds}
    write_fit(folder, (pruner, "prune", state), ("full", "tune", {}))
    target = folder.parent.parent / f"{pruner}-{sparsity}" / f"seed-{seed}"
    target.parent.mkdir(exist_ok=True)
    folder.rename(target)
    (target / "costs.json").unlink()


def test_a_sweep_gets_figures_of_its_own(tmp_path: Path) -> None:
    for pruner in ("multiflow", "omp"):
        for sparsity in (0.63, 0.9):
            for seed in (0, 1):
                write_pruned(tmp_path / "runs", pruner, sparsity, seed)
    write_run(tmp_path / "runs", "prune/retrieval", "full", 0)
    (section,) = group_runs(report.load_runs([tmp_path / "runs"]))
    found = sweep(section)
    assert {p: {round(s, 3): len(runs) for s, runs in levels.items()} for p, levels in found.items()} == {
        "multiflow": {0.63: 2, 0.9: 2},
        "omp": {0.63: 2, 0.9: 2},
    }
    out = report.write_report([tmp_path / "runs"], tmp_path / "out").parent
    pictures = sorted(p.name for p in out.glob("*.png"))
    assert pictures == [f"prune-retrieval-{kind}.png" for kind in ("seconds", "sparsity", "towers")]
    for picture in pictures:
        with Image.open(out / picture) as image:
            assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert "one modality is collapsing" in (out / "index.html").read_text(encoding="utf-8")


def test_one_sparsity_is_no_sweep(tmp_path: Path) -> None:
    write_pruned(tmp_path / "runs", "omp", 0.63, 0, seconds=None)
    (section,) = group_runs(report.load_runs([tmp_path / "runs"]))
    assert sweep(section) == {}
    out = report.write_report([tmp_path / "runs"], tmp_path / "out").parent
    assert [file.name for file in out.glob("*.png")] == ["prune-retrieval-loss.png"]  # it has no costs to draw


def test_ways_that_only_share_a_pruner_are_no_sweep(tmp_path: Path) -> None:
    """Pruned alone, with LoRA, and shortened, which leaves another share: three ways, not seeds of one."""
    runs = tmp_path / "runs"
    for name, sparsity in (("prune", 0.63), ("prune-lora", 0.63), ("prune-skip", 0.587)):
        write_pruned(runs, "multiflow", sparsity, 0)
        folder = runs / "prune" / "retrieval" / f"multiflow-{sparsity}"
        info = json.loads((folder / "seed-0" / "run.json").read_text()) | {"variant": name}
        (folder / "seed-0" / "run.json").write_text(json.dumps(info))
        folder.rename(folder.parent / name)
    (section,) = group_runs(report.load_runs([runs]))
    assert set(section.methods) == {"prune", "prune-lora", "prune-skip"} and sweep(section) == {}
    report.write_report([runs], tmp_path / "out")


def test_ticks_that_lie_close_together_are_told_apart() -> None:
    assert [_tick_text(v, ("", "K", "M")) for v in (100.1e6, 100.2e6, 100e6)] == ["100.1 M", "100.2 M", "100 M"]

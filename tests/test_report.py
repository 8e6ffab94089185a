from __future__ import annotations

import html
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from trimtab.report import page as report
from trimtab.report.canvas import assign_styles
from trimtab.report.plots import Panel, Point, loss_figure, pareto_figure, pareto_front
from trimtab.report.runs import BYTES, group_runs, read_plan
from trimtab.report.sparsity import sweep
from trimtab.report.tables import amount

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VARIANTS = ("zero-shot", "full", "lora", "unipt")
SCORES = {"zero-shot": 0.10, "full": 0.60, "lora": 0.50, "unipt": 0.55}
TRAINED = {"zero-shot": 0, "full": 12_000_000, "lora": 120_000, "unipt": 240_000}


def write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


def write_run(root: Path, name: str, variant: str, seed: int, changes: dict[str, Any] | None = None) -> Path:
    """Write a run folder; ``changes`` go into run.json."""
    folder = root / name / variant / f"seed-{seed}"
    info = {
        "format": 1,
        "name": name,
        "variant": variant,
        "seed": seed,
        "status": "finished",
        "recipe_title": f"Recipe of {name}",
        "task": name.split("/")[-1],
        "data": "pictograms:openmoji",
        "backbone": "tiny-clip",
        "git": {"commit": "0123456789abcdef", "dirty": True},
        "versions": {"torch": "2.13.0", "trimtab": "0.1.0"},
        "started": f"2026-11-22T14:{VARIANTS.index(variant):02}:{seed:02}+00:00",
        "seconds": 12.3,
    }
    primary = "recall@1" if name.endswith("retrieval") else "accuracy"
    score = SCORES[variant] + 0.02 * seed
    history = [{"step": step, "loss": 3 / (1 + step / 20) + 0.1 * seed} for step in range(0, 200, 10)]
    trained = TRAINED[variant]
    costs = {
        "params": 12_000_000,
        "trainable_params": trained,
        "macs": 900_000_000 if variant == "unipt" else 1_200_000_000,
        "dense_macs": 1_200_000_000,
        "saved_activation_bytes": 1_500_000 + trained,
        "checkpoint_bytes": 4 * trained,
        "peak_memory_bytes": None,
        "latency_ms": None if variant == "full" else {"median": 4.0 + seed, "p10": 3.5, "p90": 6.0},
        "batch_size": 32,
    }
    write_json(folder / "run.json", {**info, **(changes or {})})
    write_json(
        folder / "metrics.json",
        {"primary": primary, "chance": 0.004, "test": {primary: score, "loss": 1.5}, "history": history},
    )
    write_json(folder / "costs.json", costs)
    write_samples(folder / "samples", score)
    return folder


def write_fit(folder: Path, *methods: tuple[str, str, dict[str, Any]]) -> None:
    entries = [{"name": name, "lever": lever, "settings": {}, "state": state} for name, lever, state in methods]
    write_json(folder / "fit.json", {"format": 1, "methods": entries})


def write_samples(folder: Path, score: float) -> None:
    samples = []
    for index in range(8):
        correct = index / 8 < score
        samples.append(
            {
                "image": f"{index}.png",
                "query": f"a <b>bold</b> picture {index}",
                "prediction": "cat" if correct else "dog",
                "target": "cat",
                "correct": correct,
                "box_predicted": [14, 6, 4, 16],
                "box_target": [5, 5, 15, 15] if index % 2 else None,
                "images": [f"{(index + 1) % 8}.png", "lost.png"],
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (20, 16), (30 * index, 80, 160, 200)).save(folder / f"{index}.png")
    write_json(folder / "samples.json", samples)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for name in ("demo/retrieval", "demo/answering"):
        for variant in VARIANTS:
            for seed in (0, 1):
                write_run(root, name, variant, seed)
    plan = {"skip": ["blocks.3"], "candidates": ["blocks.2", "blocks.3"], "gates": {},
            "updates": [{"step": 1, "gates": [0.0, 0.1]}, {"step": 2, "gates": [0.0, 0.2]}]}  # fmt: skip
    for seed in (0, 1):
        write_fit(root / f"demo/retrieval/unipt/seed-{seed}", ("das", "skip", plan), ("unipt", "tune", {}))
    return root


@pytest.fixture(scope="module")
def index(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_report([runs_folder], tmp_path_factory.mktemp("report") / "out", title="A & B")


class Page(HTMLParser):
    """The links, resources, results and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []
        self.rows: list[list[str]] = []
        self._in_results = False
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.resources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag == "table":
            self._in_results = values.get("class") == "results"
        elif self._in_results and tag == "tr":
            self.rows.append([])
        elif self._in_results and tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_results and self._in_cell:
            self.rows[-1][-1] += data.strip()


def read_page(index: Path) -> Page:
    return Page(index.read_text(encoding="utf-8"))


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def test_page_tables(index: Path) -> None:
    header, *rows = read_page(index).rows[:5]

    assert header == [
        "method",
        "accuracy (%)",
        "trained parameters",
        "saved activations",
        "MACs",
        "latency",
        "on disk",
    ]
    assert [row[0] for row in rows] == list(VARIANTS)
    zero_shot, full, _, unipt = (row[1:] for row in rows)
    assert zero_shot == ["11.0 ± 1.4 (2 seeds)", "0", "1.50 MB", "1.20 G", "4.50 ± 0.71 ms", "0 B"]
    assert full == ["61.0 ± 1.4 (2 seeds)", "12.0 M (100 %)", "13.5 MB", "1.20 G", "—", "48.0 MB"]
    assert unipt[3] == "900 M (0.75× dense)"


def test_page_text_and_figures(index: Path, runs_folder: Path) -> None:
    text = index.read_text(encoding="utf-8")

    assert index.name == "index.html"
    figures = {f"demo-{task}-{kind}.png" for task in ("answering", "retrieval") for kind in ("pareto", "loss")}
    assert {file.name for file in index.parent.iterdir()} == {*figures, "index.html", "results.jsonl"}
    assert "<h1>A &amp; B</h1>" in text
    assert re.findall(r'class="best">([^<]+)', text) == ["61.0 ± 1.4 (2 seeds)"] * 2
    assert "mean ± standard deviation over 2 seeds; chance level 0.4 %" in text
    assert "one training batch of 32 samples" in text
    assert "unipt, seeds 0, 1" in text
    assert 'skips 1 of 2 candidates: <code>blocks.3</code><br><img src="data:image/png;base64,' in text
    assert "torch 2.13.0" in text and "0123456789ab (dirty)" in text
    assert f"trimtab report {runs_folder}" in text


def test_page_is_self_contained_and_escaped(index: Path) -> None:
    text = index.read_text(encoding="utf-8")
    page = Page(text)

    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert page.resources
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.resources)
    assert "url(" not in text and "@import" not in text
    assert html.escape("a <b>bold</b> picture 0") in text
    assert text.count('class="picture"') == 2 * 4 * 6


def test_unusable_runs_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "fine/retrieval", "lora", 0)
    broken = {
        reason: write_run(runs, f"broken-{index}/retrieval", "lora", 0)
        for index, reason in enumerate(
            (
                "metrics.json is missing",
                "costs.json cannot",
                "run.json cannot",
                "no finite",
                "array",
                "fit.json should",
                "failed",
            )
        )
    }
    (broken["metrics.json is missing"] / "metrics.json").unlink()
    (broken["costs.json cannot"] / "costs.json").write_text("{", encoding="utf-8")
    (broken["run.json cannot"] / "run.json").write_bytes(b"\xff\xfe")
    not_a_number = {"primary": "recall@1", "test": {"recall@1": float("nan")}}
    write_json(broken["no finite"] / "metrics.json", not_a_number)
    write_json(broken["fit.json should"] / "fit.json", {"methods": {}})
    write_json(broken["array"] / "samples" / "samples.json", {})
    write_json(broken["failed"] / "run.json", {"format": 1, "status": "failed"})

    assert [run.info["name"] for run in report.load_runs([runs])] == ["fine/retrieval"]
    text = report.write_report([runs], tmp_path / "out").read_text(encoding="utf-8")
    for reason, folder in broken.items():
        assert re.search(rf"<code>{re.escape(str(folder))}</code>: [^<]*{reason}", text)
        assert f"left out run {folder}" in caplog.text


def test_repeated_run_counts_once(tmp_path: Path) -> None:
    older = write_run(tmp_path / "old", "demo/retrieval", "lora", 0)
    newer = write_run(tmp_path / "new", "demo/retrieval", "lora", 0, {"started": "2026-12-01T00:00:00+00:00"})

    runs, omitted = report.find_runs([tmp_path, tmp_path / "old"])
    assert [run.path for run in runs] == [newer]
    assert [(run.path, str(newer) in run.reason) for run in omitted] == [(older, True)]


def test_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"no run found in {tmp_path}")) as error:
        report.load_runs([tmp_path])
    assert "run.json" in str(error.value)
    with pytest.raises(ValueError, match="nothing is at"):
        report.load_runs([tmp_path / "nowhere"])

    write_run(tmp_path, "demo/retrieval", "lora", 0, {"status": "running"})
    with pytest.raises(ValueError, match="status is 'running'"):
        report.write_report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_tables_have_the_same_rows(index: Path, runs_folder: Path) -> None:
    runs = report.load_runs([runs_folder])
    rows = read_page(index).rows
    text = report.markdown_table(runs)

    assert markdown_rows(text) == rows
    assert "### demo/retrieval" in text and "**61.0 ± 1.4 (2 seeds)**" in text

    console = Console(width=200, file=io.StringIO())
    console.print(report.summary_table(runs))
    terminal = [re.split(r"\s*│\s*", line)[1:-1] for line in console.file.getvalue().splitlines()]
    assert all(row in terminal for row in rows if row[0] != "method")


def test_single_seed_missing_costs_and_odd_names(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "demo/[bold]|$x", "lora", 0, {"variant": "_lo$ra|"})
    write_json(folder / "costs.json", {"params": 5, "latency_ms": 3})
    write_json(folder / "metrics.json", {"primary": "score", "test": {"score": 12.345}, "history": None})
    (folder / "samples" / "0.png").unlink()
    runs = report.load_runs([tmp_path])

    assert report.markdown_table(runs).splitlines()[2] == "| _lo$ra\\| | **12.3** | 3 ms |"
    text = report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    assert "Test score, 1 seed; the best is bold." in text and "no picture" in text
    assert [file.name for file in (tmp_path / "out").glob("*.png")] == ["demo-bold-x-pareto.png"]


def test_a_section_without_costs_has_no_columns_or_panels_for_them(tmp_path: Path) -> None:
    for variant in VARIANTS:
        (write_run(tmp_path / "runs", "demo/retrieval", variant, 0) / "costs.json").unlink()
    page = report.write_report([tmp_path / "runs"], tmp_path / "out")
    assert read_page(page).rows[0] == ["method", "recall@1 (%)"]
    assert "—" not in page.read_text(encoding="utf-8").split("<footer>")[0].split("<section")[1]
    assert [file.name for file in (tmp_path / "out").glob("*.png")] == ["demo-retrieval-loss.png"]


def test_the_plan_of_a_run_is_that_of_its_search(runs_folder: Path) -> None:
    assert read_plan(runs_folder / "demo/retrieval/unipt/seed-0")["skip"] == ["blocks.3"]
    with pytest.raises(ValueError, match=r"fit\.json: no method here skips blocks"):
        read_plan(runs_folder / "demo/retrieval/lora/seed-0")


def test_missing_extra_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'trimtab[report]'")):
        report.write_report([tmp_path], tmp_path / "out")


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        (0, 0, "0 B"),
        (999, 0, "999 B"),
        (999_900, 0, "1.00 MB"),
        (1234, 0, "1.23 kB"),
        (131_072, 4096, "131 ± 4 kB"),
        (2, 0.5, "2.00 ± 0.50 B"),
        (5e16, 0, "50,000 TB"),
    ],
)
def test_amount(mean: float, deviation: float, expected: str) -> None:
    assert amount(mean, BYTES, deviation) == expected


def test_figures_cope_with_odd_values() -> None:
    names = ["_$x", "a name without a single space that is longer than the panel is wide" * 2]
    styles = assign_styles(names)
    for xs in ((0, 0), (0, 5), (5, 5), (1, 1e9)):
        points = [Point(name, x, 0.5, x_error=x) for name, x in zip(names, xs, strict=True)]
        panels = [Panel("cost", points, str, log=log) for log in (True, False, True)]
        assert pareto_figure(panels, "score", styles).startswith(b"\x89PNG")
    curves = {names[0]: [{0: 1e3, 1: 0.1}, {1: 0.2}], names[1]: [{}]}
    assert loss_figure(curves, styles).startswith(b"\x89PNG")


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
    assert {p: {s: len(runs) for s, runs in levels.items()} for p, levels in found.items()} == {
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


def test_a_report_can_be_written_again_from_its_results(runs_folder: Path, tmp_path: Path) -> None:
    report.write_report([runs_folder], tmp_path / "first")
    results = tmp_path / "first" / "results.jsonl"
    report.write_report([results], tmp_path / "second")
    tables = [report.markdown_table(report.load_runs([p])) for p in (runs_folder, results)]
    assert tables[0] == tables[1] and tables[0].count("|") > 20
    assert (tmp_path / "second" / "results.jsonl").read_text() == results.read_text()


def test_a_file_that_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"path": "x"}\n')
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: expected a run"):
        report.load_runs([tmp_path / "results.jsonl"])


def test_results_of_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    line = {"path": "x", "info": {"status": "running"}, "metrics": {}, "costs": {}}
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: .*'running', not 'finished'"):
        report.load_runs([tmp_path / "results.jsonl"])

"""Reports: which runs they take, their page and their tables."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from trimtab.report import page as report
from trimtab.report.runs import BYTES, group_runs
from trimtab.report.tables import amount

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from tests.written_runs import VARIANTS, write_fit, write_json, write_run


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
    assert 'skips 1 of 2 candidates: <code>blocks.3</code><img class="gates" src="data:image/png;base64,' in text
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


def test_steps_have_a_column_where_they_differ(tmp_path: Path) -> None:
    def titles(**steps: int) -> list[str]:
        for variant, count in steps.items():
            file = write_run(tmp_path, "demo/retrieval", variant, 0) / "metrics.json"
            write_json(file, json.loads(file.read_text()) | {"steps": count})
        (head, *rows) = markdown_rows(report.markdown_table(report.load_runs([tmp_path])))
        return [row[head.index("steps")] for row in rows] if "steps" in head else []

    assert titles(full=70, lora=70, unipt=1125) == ["70", "70", "1,125"]
    (tmp_path / "demo/retrieval/lora/seed-0/metrics.json").unlink()
    assert titles(full=70, unipt=70) == []


def test_scores_have_intervals_over_rows_and_stand_beside_full_tuning(tmp_path: Path) -> None:
    credits = {"full": [1, 1, 0, 1] * 50, "lora": [1, 0, 0, 1] * 50, "unipt": [1, 1, None, 1] * 50}
    for variant in ("zero-shot", *credits):
        folder = write_run(tmp_path, "demo/retrieval", variant, 0)
        told = json.loads((folder / "metrics.json").read_text())
        write_json(folder / "metrics.json", told | ({"interval": [0.41, 0.58]} if variant == "lora" else {}))
        if variant in credits:
            told = {"metric": "recall@1", "table": "t", "credits": credits[variant]}
            write_json(folder / "rows.json", told)
    rows = {row[0]: row[1:3] for row in markdown_rows(report.markdown_table(report.load_runs([tmp_path])))}
    assert rows["method"] == ["recall@1 (%)", "beside full"]
    assert rows["zero-shot"] == ["10.0", "—"]
    assert rows["lora"][0] == "50.0 (41.0 to 58.0)"
    low, high = re.fullmatch(r"-25\.0 \((-\d+\.\d) to (-\d+\.\d)\)", rows["lora"][1]).groups()
    assert -32 < float(low) < -25 < float(high) < -18  # a quarter of 200 rows: 25 +- 6
    assert rows["unipt"] == ["55.0", "—"]  # its rows are not those that full tuning was scored on
    assert rows["full"] == ["60.0", ""]
    page = report.write_report([tmp_path], tmp_path / "out").read_text()
    assert "95 % intervals over test rows" in page and "50.0 (41.0 to 58.0)" in page
    kept = report.markdown_table(report.load_runs([tmp_path / "out" / "results.jsonl"]))
    assert kept == report.markdown_table(report.load_runs([tmp_path])), "results hold the rows too"
    other = {"metric": "recall@1", "table": "another", "credits": credits["lora"]}
    write_json(tmp_path / "demo/retrieval/lora/seed-0/rows.json", other)
    assert "beside" not in report.markdown_table(report.load_runs([tmp_path]))  # as many rows, of another table
    write_json(tmp_path / "demo/retrieval/lora/seed-0/rows.json", {"credits": 3})
    runs, omitted = report.find_runs([tmp_path])
    assert [o.reason for o in omitted] == ["rows.json should give a list as 'credits'"] and len(runs) == 3
    write_json(tmp_path / "demo/retrieval/lora/seed-0/rows.json", other | {"pictures": [0, 0]})
    (short,) = report.find_runs([tmp_path])[1]
    assert short.reason == "rows.json should give as many 'pictures' as 'credits', found 2 and 200"


def test_differences_are_of_the_means_over_all_seeds_with_intervals_over_rows_and_seeds(tmp_path: Path) -> None:
    rows = {("full", 0): [0, 1] * 50, ("full", 1): [0, 0] * 50, ("lora", 0): [1, 1] * 50, ("lora", 2): [1, 1] * 50}
    for (variant, seed), credits in rows.items():
        folder = write_run(tmp_path, "demo/retrieval", variant, seed)
        write_json(folder / "rows.json", {"metric": "recall@1", "table": "t", "credits": credits})
    (section,) = group_runs(report.load_runs([tmp_path]))
    gap, low, high = section.beside("lora")
    assert gap == 75 and low < 50 and high == pytest.approx(100)  # the seeds of full tuning are 50 and 100 away
    assert section.beside("full") is None and not section.are_paired("full")


def test_rows_with_one_picture_are_drawn_together(tmp_path: Path) -> None:
    widths = []
    for name, more in (("apart", {}), ("together", {"pictures": [5 * (i // 5) for i in range(500)]})):
        for variant, credits in (("full", [0] * 500), ("lora", [i // 5 % 2 for i in range(500)])):
            folder = write_run(tmp_path / name, "demo/retrieval", variant, 0)
            write_json(folder / "rows.json", {"metric": "recall@1", "table": "t", "credits": credits, **more})
        (section,) = group_runs(report.load_runs([tmp_path / name]))
        gap, low, high = section.beside("lora")
        assert gap == 50
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] * 5**0.5, rel=0.1)


def test_a_section_without_costs_has_no_columns_or_panels_for_them(tmp_path: Path) -> None:
    for variant in VARIANTS:
        (write_run(tmp_path / "runs", "demo/retrieval", variant, 0) / "costs.json").unlink()
    page = report.write_report([tmp_path / "runs"], tmp_path / "out")
    assert read_page(page).rows[0] == ["method", "recall@1 (%)"]
    assert "—" not in page.read_text(encoding="utf-8").split("<footer>")[0].split("<section")[1]
    assert [file.name for file in (tmp_path / "out").glob("*.png")] == ["demo-retrieval-loss.png"]


def test_missing_extra_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=re.escape("pip install -e '.[report]'")):
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


def test_seeds_of_another_recipe_stand_by_themselves_on_the_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_run(tmp_path, "demo/retrieval", "full", seed, {"recipe": f"recipe-{seed}"})
        plan = {"skip": ["blocks.3"], "candidates": ["blocks.2", "blocks.3"], "gates": {}, "updates": []}
        write_fit(folder, ("das", "skip", plan))
    page = report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    assert page.count("full (recipe 2)") >= 2  # in the table, and beside its plan
    assert "seeds 0, 1" not in page


def test_a_metric_that_is_no_share_is_never_shown_in_percent(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "demo/captions", "full", 0)
    told = {"primary": "cider", "chance": None, "test": {"cider": 0.87}, "history": []}
    (folder / "metrics.json").write_text(json.dumps(told))
    assert "cider (%)" not in report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")


def test_a_chance_level_has_no_exponent(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "demo/retrieval", "full", 0)
    told = json.loads((folder / "metrics.json").read_text()) | {"chance": 0.996}
    (folder / "metrics.json").write_text(json.dumps(told))
    assert "chance level 100 %" in report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")

"""Studies keep their rules: equal trials, the rate chosen on validation rows, nothing trained twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

STUDIES = Path(__file__).parent.parent / "studies"
sys.path.insert(0, str(STUDIES))

import protocol

RATES = {"full": (1.0, 2.0), "lora": (3.0,)}


def row(way: str, rate: float, seed: int, validation: float, each: tuple[float, ...] = (0.0, 100.0)) -> protocol.Row:
    return {"way": way, "rate": rate, "seed": seed, "validation": validation, "steps": 100, "seconds": 1800,
            "metric": "accuracy", "each": list(each), "test": {"accuracy": 0.5},
            "costs": {c.key: 10 for c in protocol.SHOWN}}  # fmt: skip


def trials(file: Path, *rows: protocol.Row) -> protocol.Trials:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return protocol.Trials(file, RATES, lambda way, rate, seed: (way, rate, seed), lambda folder: [0.0, 100.0],
                           lambda recipe: f"{recipe[0]} as today")  # fmt: skip


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """What is trained, by something that takes no time; the second rate is the better one."""
    found = []

    def run(recipe: tuple[str, float, int], folder: Path) -> None:
        found.append(recipe)
        told = {"primary": "accuracy", "steps": 7, "test": {"accuracy": 0.5}, "history": [{"loss": 1.0}],
                "validation": {"plateau": True, "scores": [{"step": 5, "accuracy": recipe[1]}]}}  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(told))

    monkeypatch.setattr(protocol, "run", run)
    return found


def test_seed_0_tries_every_rate_and_other_seeds_take_the_best(tmp_path: Path, trained: list) -> None:
    study = trials(tmp_path / "x.jsonl", row("full", 1.0, 0, 0.5))
    study.fill(["full"], [0, 1], tmp_path / "work")
    assert trained == [("full", 2.0, 0), ("full", 2.0, 1)]  # the first rate was there
    study.fill(["full"], [0, 1], tmp_path / "work")
    assert len(trained) == 2
    assert sorted(study.measured()["full"]) == [0, 1]
    assert not list((tmp_path / "work").iterdir())  # what a training leaves goes when its line is written


def test_a_rate_more_is_tried_with_seed_0_and_taken_if_it_is_the_best(tmp_path: Path, trained: list) -> None:
    study = trials(tmp_path / "x.jsonl", row("full", 1.0, 0, 0.5), row("full", 2.0, 0, 0.6))
    study.fill(["full"], [0, 1], tmp_path / "work", more=(4.0,))
    assert trained == [("full", 4.0, 0), ("full", 4.0, 1)]


def test_of_rates_with_equal_scores_the_highest_is_taken(tmp_path: Path) -> None:
    for rows in ((1.0, 2.0), (2.0, 1.0)):
        study = trials(tmp_path / "x.jsonl", *(row("full", rate, 0, 0.5) for rate in rows))
        assert study.chosen("full") == 2.0


def test_other_seeds_wait_for_all_rates_of_seed_0(tmp_path: Path, trained: list, capsys: pytest.CaptureFixture) -> None:
    study = trials(tmp_path / "x.jsonl", row("full", 1.0, 0, 0.5))
    study.fill(["full"], [1], tmp_path / "work")
    assert not trained
    assert "seed 0 is not trained at 2 yet" in capsys.readouterr().out
    assert study.measured() == {}


def test_tables_show_the_chosen_rate_and_differences_of_the_means_over_all_seeds(tmp_path: Path) -> None:
    study = trials(
        tmp_path / "x.jsonl",
        row("full", 1.0, 0, 0.9, (0, 0)), row("full", 2.0, 0, 0.1, (100, 100)),
        row("lora", 3.0, 0, 0.5, (100, 50)), row("lora", 3.0, 1, 0.5, (0, 0)),
    )  # fmt: skip
    told = list(protocol.tables(study, ["full"]))
    assert told[2].startswith("| full | 1 | 1 (1 of 2) | 0.0 | 100 | - |")
    assert told[3].startswith("| lora | 2 | 3 (1 of 1) | 37.5 ± 53.0 | 100 | +37.5 (+0.0 to +100.0)* |")
    assert told[-1] == "4 trainings, 2.0 hours of one processor"


def test_a_summary_has_scores_and_costs_in_one_table() -> None:
    told = protocol.summary({"lora": [1.0, 2.0]}, "rSum", lambda way, key: 4e6, protocol.SHOWN[:1], {})
    title = protocol.SHOWN[0].title
    assert list(told) == [f"| | rSum | {title} | peak memory, alone | a step, alone |", "|---|---:|---:|---:|---:|",
                          "| lora | 1.5 ± 0.7 | 4.00 M | - | - |"]  # fmt: skip


def test_what_was_measured_alone_stands_beside_what_is_counted(tmp_path: Path) -> None:
    study = trials(tmp_path / "x.jsonl", row("full", 1.0, 0, 0.9), row("full", 2.0, 0, 0.1), row("lora", 3.0, 0, 0.5))
    study.alone.write_text(json.dumps({"lora": {"peak_memory_bytes": 2_000_000, "step_seconds": 0.085}}))
    assert study.alone == tmp_path / "x_alone.json"
    told = list(protocol.tables(study, ["full"]))
    assert [line.split(" | ")[-2:] for line in told[-4:-2]] == [["-", "- |"], ["2.00 MB", "0.085 s |"]]


def test_the_blocks_that_a_run_left_out_are_told(tmp_path: Path) -> None:
    fit = trimtab.adapt(trimtab.load("tiny-vilt").model)
    fit.prune("omp", sparsity=0.5)
    fit.skip("random-skip", skip=2, adapters="none")
    fit.save(tmp_path / "run")
    assert len(fit.plan.skipped) == 2 and protocol.skipped_in(tmp_path / "run") == fit.plan.skipped
    assert protocol.skipped_in(tmp_path) == []


def test_a_training_alone_is_short_and_without_a_cache() -> None:
    # in a process of its own: `alone` imports `vse`, which registers methods that other tests must not meet
    code = (
        "import alone; r = alone.recipe_of('compose/vqa', 'prune-skip-unipt', None, None); t = r.training; "
        "print(*[m['name'] for m in r.methods], t.steps, t.schedule, t.cache, r.data['train'], r.data['test'])"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=STUDIES, check=True, text=True,
                           stdout=subprocess.PIPE).stdout  # fmt: skip
    assert found.split() == ["multiflow", "das", "unipt", "12", "linear", "None", "512", "32"]


def test_rows_without_a_difference_are_not_given_an_interval() -> None:
    assert protocol.apart({0: row("full", 1.0, 0, 0.5)}, {}) == "-"
    assert protocol.apart({0: row("full", 1.0, 0, 0.5)}, {0: row("lora", 1.0, 0, 0.5)}) == "-"


def test_two_ways_are_compared_seed_by_seed_too() -> None:
    full = {seed: row("full", 1.0, seed, 0.5, (0, 0)) for seed in (0, 1)}
    lora = {0: row("lora", 3.0, 0, 0.5, (100, 50)), 1: row("lora", 3.0, 1, 0.5, (0, 50)), 2: row("lora", 3.0, 2, 0.5)}
    told = protocol.compared({"full": full, "lora": lora}, "lora", "full")
    assert told.startswith("lora beside full: +50.0 (") and told.endswith("); by seed +75.0, +25.0")
    assert protocol.compared({"full": full}, "lora", "full") == "lora beside full: -"


def test_trials_of_a_recipe_are_its_learning_rate_and_half() -> None:
    study = protocol.of_recipe("compose/retrieval")
    assert study.rates["full"] == (0.00025, 0.0005)
    recipe = study.recipe("lora", 0.008, 3)
    assert (recipe.variant, recipe.seed, recipe.training.learning_rate) == ("lora", 3, 0.008)


def test_a_recipe_that_trains_for_a_fixed_time_is_refused() -> None:
    with pytest.raises(ValueError, match="demo/vqa: expected `schedule: plateau`"):
        protocol.of_recipe("demo/vqa")


def test_a_line_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path, trained: list) -> None:
    study = trials(tmp_path / "x.jsonl", row("lora", 3.0, 0, 0.5))  # which tells no recipe
    study.fill(["lora"], [0, 1], tmp_path / "work")
    assert trained == [("lora", 3.0, 1)] and study.lines()[1]["recipe"] == "lora as today"
    study = trials(tmp_path / "x.jsonl", row("lora", 3.0, 0, 0.5) | {"recipe": "lora as it was"})
    with pytest.raises(SystemExit, match=r"lora at 3 with seed 0 was trained by another recipe: take the line away"):
        study.fill(["lora"], [0], tmp_path / "work")


def test_what_decides_a_training_is_told_by_its_hash() -> None:
    def asked(*changes: str) -> str:
        return protocol.print_of(protocol.read("compose/vqa", ["variants=[lora]", "seeds=[0]", *changes])[0])

    assert asked() == asked("seeds=[1]") == asked("title=other") != asked("training.patience=9")
    assert len({asked(), asked("data.test=500"), asked("backbone.name=tiny-clip"), asked("methods.0.rank=8")}) == 4


def test_other_test_rows_are_not_paired() -> None:
    one, other = row("full", 1.0, 0, 0.5, (0, 0)), row("lora", 3.0, 0, 0.5, (100, 50))
    assert protocol.apart({0: other | {"table": "a"}}, {0: one | {"table": "a"}}).startswith("+75.0")
    assert protocol.apart({0: other | {"table": "a"}}, {0: one}).startswith("+75.0")  # an older line tells none
    assert protocol.apart({0: other | {"table": "a"}}, {0: one | {"table": "b"}}) == "other test rows"

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from trimtab import cli, listing
from trimtab.experiments import recipe


@pytest.fixture
def trimtab(capsys, monkeypatch):
    """Run a command in this process; gives its exit status, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(map(str, arguments)))
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def file(tiny_raw, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_raw("tiny-vilt", "vqa", ["full"], batch_size=2)))
    return path


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


def test_help_is_quick():
    """Neither the parser nor `import trimtab` loads torch."""
    code = "import sys, trimtab.cli, trimtab.experiments.recipe; trimtab.cli._parser(); print(*sys.modules)"
    done = python("-c", code)
    assert "trimtab.cli" in done.stdout.split(), done.stderr
    assert not {"torch", "transformers", "datasets"} & set(done.stdout.split())


def test_help_lists_the_commands():
    done = python("-m", "trimtab", "--help")
    assert done.returncode == 0
    for command in ("run", "demo", "report", "export", "convert", "speed", "cost", "anatomy", "list"):
        assert f"\n    {command} " in done.stdout


def test_no_arguments_print_the_help(trimtab):
    status, out, _ = trimtab()
    assert status == 0 and "usage: trimtab" in out


@pytest.mark.parametrize("command", ["run", "cost"])
def test_an_unknown_recipe_exits_2_with_the_nearest(command, trimtab):
    status, out, err = trimtab(command, "pretrain/tiny-clp")
    assert (status, out) == (2, "")
    assert err.startswith(f"trimtab {command}: no recipe file 'pretrain/tiny-clp'")
    assert "did you mean 'pretrain/tiny-clip'" in err and "Traceback" not in err


def test_run_checks_everything_before_it_starts(trimtab, file, tmp_path):
    status, _, err = trimtab("run", file, "data.name=pictogrms", "--out", tmp_path / "runs")
    assert status == 2 and "unknown data source 'pictogrms': did you mean 'pictograms'" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps", "'training.steps': expected key=value, such as training.steps=10"),
        ("training.stps=1", "unknown key 'stps': did you mean 'steps'"),
        ("training.steps=many", "steps"),
        ("methods.4.rank=1", "'methods.4.rank' does not name a field of the recipe"),
    ],
)
def test_a_bad_override_exits_2(override, message, trimtab, file):
    status, out, err = trimtab("cost", file, override)
    assert (status, out) == (2, "") and message in err


def test_errors_are_raised_when_debugging(file, monkeypatch):
    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    with pytest.raises(recipe.RecipeError):
        cli.main(["cost", str(file), "training.stps=1"])


@pytest.mark.parametrize("order", ["{} training.batch_size=3 --json", "--json {} training.batch_size=3"])
def test_cost_as_json(order, trimtab, file):
    status, out, _ = trimtab("cost", *(word.format(file) for word in order.split()))
    found = json.loads(out)
    assert status == 0 and {
        "variant", "params", "trainable_params", "macs", "dense_macs", "saved_activation_bytes", "checkpoint_bytes",
    } <= set(found)  # fmt: skip
    assert found["batch_size"] == 3 and found.pop("assumes") == []
    assert all(v > 0 for k, v in found.items() if k != "variant")


@pytest.mark.parametrize(
    "line",
    [
        "run R a=1 b=2 --out O --redo", "run --out O R --redo a=1 b=2", "run R --out O a=1 --redo b=2",
        "run --redo --out=O R a=1 b=2",
    ],
)  # fmt: skip
def test_options_and_overrides_stand_in_any_order(line):
    found = cli.parse(line.split())
    assert (found.command, found.recipe, found.overrides) == ("run", "R", ["a=1", "b=2"])
    assert (str(found.out), found.redo) == ("O", True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnu x", "unknown command 'rnu': did you mean 'run'"),
        ("run", "the following arguments are required: recipe"),
        ("run x --ot O", "unrecognized arguments: --ot"),
        ("speed x --tokens many", "invalid int value: 'many'"),
        ("convert a b --to spars", "invalid choice: 'spars'"),
    ],
)
def test_a_wrong_command_line_exits_2(line, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_the_help_of_a_command_shows_all_arguments(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "usage: trimtab run " in out
    assert all(word in out for word in ("recipe", "[overrides ...]", "--out", "(default: runs)", "--redo"))
    assert "default: False" not in out


def test_cost_of_variants(trimtab, file):
    file.write_text(file.read_text() + "variants: {all: {}, head: {methods: [linear-probe]}}\n")
    _, out, _ = trimtab("cost", file, "--json")
    everything, head = json.loads(out)
    assert (everything["variant"], head["variant"]) == ("all", "head")
    # What no loss of the task reaches is not trained: ViLT's pooler in a task that reads its first token.
    assert head["trainable_params"] < everything["trainable_params"] < everything["params"] == head["params"]
    _, out, _ = trimtab("cost", file)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip().startswith(("all", "head"))}
    assert rows["all"][1:3] == rows["head"][1:3] == ["1.86", "M"] and f"{head['batch_size']}" in out


def test_anatomy_prints_the_towers(trimtab):
    status, out, _ = trimtab("anatomy", "tiny-clip")
    assert status == 0 and "CLIPModel" in out
    lines = {name: next(line for line in out.splitlines() if name in line.split()) for name in ("vision", "text")}
    assert "8" in lines["vision"].split() and "4" in lines["text"].split()  # blocks
    assert all("128" in line.split() for line in lines.values())  # width
    assert "never pruned: " in out and "heads: 'visual_projection.weight' and 1 more" in " ".join(out.split())


def test_anatomy_of_an_unknown_model(trimtab):
    status, _, err = trimtab("anatomy", "tiny-clop")
    assert status == 2 and "did you mean 'tiny-clip'" in err and "nor is there a folder" in err


def test_list_shows_the_settings_of_a_method_with_their_meaning(trimtab):
    status, out, _ = trimtab("list", "methods", "das")
    assert status == 0
    (line,) = (line for line in out.splitlines() if "│ skip " in line)
    assert "2" in line and "How many blocks are skipped (k)" in line
    for setting in ("search_steps", "reduction", "subsets"):
        (line,) = (line for line in out.splitlines() if f"│ {setting} " in line)
        assert len(line.split("│")[3].strip()) > 10, f"{setting} has no meaning"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", ("das", "unipt", "multiflow", "full", "linear-probe")), ("backbones", ("tiny-clip", "tiny-vilt")),
        ("tasks", ("vqa", "retrieval", "grounding", "matching")), ("data", ("pictograms", "easy-vqa")),
        ("recipes", ("pretrain/tiny-clip",)), ("training", ("steps", "Optimiser steps", "learning_rate")),
    ],
)  # fmt: skip
def test_list(kind, names, trimtab):
    status, out, _ = trimtab("list", kind)
    assert status == 0 and all(name in out for name in names)


@pytest.mark.parametrize("kind", ["methods", "backbones", "tasks", "data", "recipes"])
def test_everything_listed_can_be_asked_about(kind, trimtab):
    for name in listing.entries(kind):
        status, out, err = trimtab("list", kind, name)
        assert status == 0 and name in out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("method",), "unknown kind 'method': did you mean 'methods'"),
        (("methods", "dsa"), "unknown method 'dsa': did you mean 'das'"),
        (("training", "trainin"), "unknown training 'trainin': did you mean 'training'"),
    ],
)
def test_list_of_what_is_not_there(arguments, message, trimtab):
    status, _, err = trimtab("list", *arguments)
    assert status == 2 and message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "nowhere", "out"), "nowhere: not a finished run"),
        (("convert", "nowhere.ckpt", "out"), "nowhere.ckpt: there is no such file or folder"),
    ],
)
def test_a_path_that_is_not_there_is_named(trimtab, words, message):
    status, _, err = trimtab(*words)
    assert status == 2 and message in err


def test_cost_counts_a_variant_once_whatever_its_seeds(capsys):
    overrides = ["seeds=[0, 1, 2]", "variants=[linear-probe, full]"]
    assert cli.main(["cost", "compose/retrieval", *overrides, "--json"]) == 0
    assert [row["variant"] for row in json.loads(capsys.readouterr().out)] == ["full", "linear-probe"]


def test_list_prints_brackets_as_they_are(capsys):
    assert cli.main(["list", "backbones"]) == 0
    assert "trimtab[real]" in capsys.readouterr().out

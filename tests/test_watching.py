"""Runs seen from outside: lines without a terminal, the log that grows, services, failed runs among others."""

from __future__ import annotations

import json
import os
import signal

import pytest
import yaml

from trimtab import cli, progress
from trimtab.experiments import recipe, run
from trimtab.experiments.watching import RunLog, check_services
from trimtab.report.watch import Watcher, watch


@pytest.fixture
def at_once(monkeypatch):
    """Every step is told."""
    monkeypatch.setattr(progress, "EVERY", 0.0)


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- lines ---


def test_without_a_terminal_a_line_tells_step_loss_rate_and_time_left(at_once, capsys):
    with progress.progress("training", 10) as job:
        job.started -= 4  # as if it had worked for 4 seconds
        job.update(2, loss=1.23456, rate=3e-4)
    out, err = capsys.readouterr()
    assert out == "" and err == "training: step 2 of 10, loss 1.235, rate 3.0e-04, 2 s a step, 16 s left\n"


def test_lines_come_every_30_seconds_whatever_is_at_work(monkeypatch, capsys):
    clock = iter(range(0, 1000, 7))  # each look at the clock is 7 seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "_told", 0.0)
    for _ in range(10):  # many short pieces of work, none of which takes 30 seconds
        with progress.progress("trying plans") as job:
            job.add()
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) < 10 and all(line.startswith("trying plans: step 1") for line in lines)


def test_the_time_left_does_not_count_what_was_done_before():
    job = progress.Job("training", 100, done=90)
    job.start()
    try:
        job.started -= 5
        assert job.left() is None  # nothing new is done, and nothing is known
        job.update(95)
        assert job.left() == pytest.approx(5, abs=0.5)
    finally:
        job.stop()


def test_other_processes_than_the_first_are_silent(at_once, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    heard = []
    with progress.listening(heard.append), progress.progress("training", 3) as job:
        job.add()
    assert capsys.readouterr() == ("", "") and not heard


def test_work_that_fails_is_no_longer_at_work():
    with pytest.raises(ZeroDivisionError), progress.progress("training", 3):
        _ = 1 / 0
    assert not progress._open


@pytest.mark.parametrize(("seconds", "words"), [(5, "5 s"), (600, "10 min"), (7200, "2.0 h")])
def test_spans(seconds, words):
    assert progress.span(seconds) == words


# --- the log of a run ---


@pytest.fixture(scope="module")
def told(tiny_raw, tmp_path_factory):
    """A run whose cache is filled, whose side networks train, and which is evaluated."""
    raw = tiny_raw("tiny-clip", "retrieval", ["unipt"], log_every=1, cache="fp16")
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "EVERY", 0.0)
        run.run(recipe.expand(raw, "test")[0], folder, measure_costs=False)
    return folder


def test_a_run_logs_what_it_does(told):
    found = entries(told)
    assert found[0]["event"] == "start" and not found[0]["resumed"] and found[-1]["event"] == "finished"
    assert {e["title"] for e in found if e["event"] == "progress"} == {"cache", "test default", "evaluation"}
    steps = [e for e in found if e["event"] == "train"]
    history = json.loads((told / "metrics.json").read_text())["history"]
    assert [e["step"] for e in steps] == [1, 2, 3] == [h["step"] for h in history]
    assert [e["loss"] for e in steps] == [h["loss"] for h in history]
    (scores,) = [e["metrics"] for e in found if e["event"] == "evaluated"]
    assert scores == json.loads((told / "metrics.json").read_text())["test"]


def test_a_run_that_is_ended_leaves_its_log_and_goes_on_in_it(tiny_raw, tmp_path, monkeypatch, at_once):
    from trimtab.methods.tune.full import Full

    methods = [{"name": "multiflow", "batches": 1, "batch_size": 4}, "full"]
    r = recipe.expand(tiny_raw("tiny-clip", "retrieval", methods, steps=4, log_every=1, save_every=2), "test")[0]

    class Stop(run.training.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Full, "callbacks", lambda self: [Stop()])
        with pytest.raises(KeyboardInterrupt):
            run.run(r, tmp_path / "run", measure_costs=False)
    assert not progress._open  # what comes next shows its own bar
    first = entries(tmp_path / "run")
    assert [e.get("step") for e in first if e["event"] == "train"] == [1, 2]
    assert "calibration" in {e.get("title") for e in first}
    assert first[-1] | {"time": 0} == {"time": 0, "event": "failed", "error": "KeyboardInterrupt: "}
    run.run(r, tmp_path / "run", measure_costs=False)
    second = entries(tmp_path / "run")[len(first) :]
    assert second[0]["event"] == "start" and second[0]["resumed"]
    assert [e["step"] for e in second if e["event"] == "train"] == [3, 4]


def test_a_log_survives_a_kill_in_the_middle_of_a_line(tmp_path):
    child = os.fork()
    if not child:
        log = RunLog(tmp_path)
        log({"event": "start"})
        log({"event": "train", "step": 1, "loss": float("nan")})
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    file = tmp_path / "log.jsonl"
    assert [e["event"] for e in entries(tmp_path)] == ["start", "train"] and entries(tmp_path)[1]["loss"] == "nan"
    with file.open("a") as opened:
        opened.write('{"event": "tra')
    again = RunLog(tmp_path)
    again({"event": "start"})
    again.file.close()
    assert json.loads(file.read_text().splitlines()[-1])["resumed"]
    lines = list(Watcher([tmp_path]).lines())
    assert len(lines) == 3 and "loss" not in lines[1]  # the broken one is passed over


def test_a_finished_run_that_is_done_again_begins_its_log_anew(tmp_path):
    for _ in range(2):
        log = RunLog(tmp_path, fresh=True)
        log({"event": "start"})
        log.file.close()
    assert [e["resumed"] for e in entries(tmp_path)] == [False]


# --- report --watch ---


def test_watching_shows_new_lines_and_draws_again_when_a_run_is_finished(tmp_path):
    lines, drawn = [], []
    run_folder = tmp_path / "runs" / "a" / "b"

    watcher = Watcher([tmp_path / "runs"])
    assert not list(watcher.lines()) and not watcher.changed()  # nothing is there yet
    log = RunLog(run_folder)
    log({"event": "start"})
    log({"event": "train", "title": "t", "step": 20, "loss": 0.5, "learning_rate": 1e-3})
    shown = list(watcher.lines())
    assert [s.split(": ", 1)[0] for s in shown] == ["a/b", "a/b"] and shown[1].endswith(
        "t: step 20, loss 0.5, rate 1.0e-03"
    )
    assert not list(watcher.lines())
    log.file.write('{"time": "2026-01-01T10:11:12", "event": "fin')
    log.file.flush()
    assert not list(watcher.lines())  # half a line waits for its other half
    log.file.write('ished"}\n')
    log.file.close()
    assert list(watcher.lines()) == ["a/b: 10:11:12 finished"]
    (run_folder / "run.json").write_text("{}")
    assert watcher.changed() and not watcher.changed()
    watch([tmp_path / "runs"], lambda: drawn.append(1), lines.append, looks=2, pause=0)
    assert len(lines) == 3 and drawn == [1]


def test_a_log_that_began_anew_is_read_from_its_start(tmp_path):
    def write(*times):
        lines = [json.dumps({"time": f"2026-01-01T10:00:{t}", "event": "start"}) for t in times]
        (tmp_path / "log.jsonl").write_text("".join(line + "\n" for line in lines))

    watcher = Watcher([tmp_path])
    write("01", "02")
    assert len(list(watcher.lines())) == 2
    write("31", "32", "33")  # longer than the one before it was
    assert [line.split()[-2] for line in watcher.lines()] == ["10:00:31", "10:00:32", "10:00:33"]


def test_report_watches_until_it_is_interrupted(told, tmp_path, capsys, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.report.watch.time.sleep", interrupted)
    assert cli.main(["report", str(told), "--watch", "--out", str(tmp_path / "page")]) == 0
    out = capsys.readouterr().out
    assert "finished" in out and "evaluated: " in out and (tmp_path / "page" / "index.html").is_file()


# --- services ---


def test_a_service_that_is_not_installed_is_named_before_anything_runs(tiny_raw, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_raw("tiny-clip", "retrieval", report_to=["mlflow"])))
    assert cli.main(["run", str(file), "--out", str(tmp_path / "runs")]) == 2
    assert "training.report_to: 'mlflow' needs the package 'mlflow', which is not installed: pip install mlflow" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "runs").exists()
    with pytest.raises(recipe.RecipeError, match="report_to"):
        recipe.expand(tiny_raw("tiny-clip", "retrieval", report_to=["tensorbord"]), "test")


WRITER = """
class SummaryWriter:
    def __init__(self, log_dir):
        import pathlib
        self.folder = pathlib.Path(log_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
    def add_scalar(self, name, value, step):
        with (self.folder / "scalars").open("a") as file:
            file.write(f"{name} {step}\\n")
    def add_text(self, *a): ...
    def flush(self): ...
    def close(self): ...
"""


def test_a_service_gets_the_curve_through_the_trainer(tiny_raw, tmp_path, monkeypatch):
    (tmp_path / "packages" / "tensorboardX").mkdir(parents=True)
    (tmp_path / "packages" / "tensorboardX" / "__init__.py").write_text(WRITER)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    check_services(["tensorboard"])
    raw = tiny_raw("tiny-clip", "retrieval", ["linear-probe"], log_every=1, report_to=["tensorboard"])
    folder = run.run(recipe.expand(raw, "test")[0], tmp_path / "run", measure_costs=False)
    scalars = (folder / "tensorboard" / "scalars").read_text().splitlines()
    assert {"train/loss 1", "train/loss 3", "train/learning_rate 2"} <= set(scalars)
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


# --- several runs ---


def test_a_failed_run_does_not_keep_the_others_from_running(tiny_raw, tmp_path, capsys):
    raw = tiny_raw("tiny-clip", "retrieval", ["linear-probe"], steps=1) | {"costs": False}
    raw["variants"] = {"bad": {"methods": [{"name": "lst", "towers": ["nowhere"]}]}, "last": {}}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(raw))
    assert cli.main(["run", str(file), "--out", str(tmp_path / "runs")]) == 1
    out, err = capsys.readouterr()
    assert "last seed 0: " in out and "bad seed 0: failed" in err
    assert "1 of 2 runs failed:" in err and "nowhere" in err.splitlines()[-1] and "Traceback" not in err
    assert (tmp_path / "runs" / "tiny" / "last-seed0" / "run.json").is_file()
    assert cli.main(["run", str(file), "variants=[bad]", "--out", str(tmp_path / "runs")]) == 2  # by itself as before

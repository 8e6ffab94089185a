"""Searches on models and data of one's own: every search through `BatchSession`, its data, its training."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.backbones.test_meter import batch as meter_batch
from tests.backbones.test_meter import tiny as tiny_meter
from tests.models.zoo import ZOO
from trimtab.anatomy import Anatomy
from trimtab.methods import METHODS, BatchSession
from trimtab.methods.skip.search.das import DAS
from trimtab.methods.skip.search.journal import Journal

SEARCHES = {
    "das": {"search_steps": 4, "turn": 1, "warmup": 0.3, "subsets": 2},
    "linear-skip": {"search_steps": 2, "evaluations": 3},
    "bandit-skip": {"search_steps": 2, "evaluations": 3, "draws": 2},
    "greedy-skip": {"search_steps": 2},
    "exhaustive-skip": {"search_steps": 2},
    "block-influence": {},
    "random-skip": {},
}


def decoder() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    return ZOO["llava"].model(), ZOO["llava"].batch, {}


def dual() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    return ZOO["clip"].model(), {**ZOO["clip"].batch, "return_loss": True}, {}


def fusion() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    return tiny_meter()[0], meter_batch(), {"loss": lambda out: out.pooled.square().mean()}


MODELS = {"decoder": decoder, "dual encoder": dual, "fusion": fusion}


def session_of(kind: str, **more: Any) -> BatchSession:
    model, batch, settings = MODELS[kind]()
    return BatchSession(model, Anatomy.of(model), [batch], [batch], **{**settings, **more})


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("kind", MODELS)
def test_every_search_works_on_a_model_of_ones_own(kind, name):
    session = session_of(kind)
    before, required = values(session.plain), [p.requires_grad for p in session.plain.parameters()]
    method = METHODS[name](skip=1, reduction=4, **SEARCHES[name])
    method.prepare(session)
    assert all(torch.equal(t, before[n]) for n, t in session.plain.state_dict().items())
    assert [p.requires_grad for p in session.plain.parameters()] == required
    assert len(method.plan.skipped) == 1 and method.plan.macs > 0
    model = session.plain.requires_grad_(False)
    method.attach(model, session.anatomy)
    names = {n for n, _ in model.named_parameters() if ".das_" in n or ".adapter." in n or ".others." in n}
    assert names
    assert set(method.trained) == (names if "search_steps" in SEARCHES[name] else set())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert all(shapes[n] == t.shape for n, t in method.trained.items())
    assert {w.path for w in session.anatomy.weights(model)}.isdisjoint(names), "added modules are never pruned"


def test_a_budget_is_counted_on_the_first_training_batch():
    session = session_of("dual encoder")
    method = METHODS["random-skip"](budget="10% macs", adapters="none")
    method.prepare(session)
    assert method.plan.macs <= 0.9 * method.plan.dense_macs


# --- what a search has trained ----------------------------------------------------------------------------------------


def test_what_the_search_has_trained_is_kept_and_frozen(tmp_path):
    session = session_of("decoder", folder=tmp_path, learning_rate=0.05)
    das = DAS(skip=1, reduction=4, towers=("text",), **SEARCHES["das"])
    das.prepare(session)
    again = DAS(skip=1, reduction=4, towers=("text",), **SEARCHES["das"])
    again.prepare(session_of("decoder", folder=tmp_path, learning_rate=0.05))
    assert again.trained.keys() == das.trained.keys(), "a finished search is read again"
    assert all(torch.equal(t, das.trained[n]) for n, t in again.trained.items())
    model = session.plain.requires_grad_(False)
    again.attach(model, session.anatomy)
    fresh = {n: p for n, p in model.named_parameters() if n in again.trained}
    assert all(p.requires_grad for p in fresh.values())
    assert not all(torch.equal(p, again.trained[n]) for n, p in fresh.items()), "attached adapters are new"
    again.keep_trained(model, ("vision",))
    assert all(p.requires_grad for p in fresh.values()), "of another tower"
    again.keep_trained(model, ("text",))
    assert all(torch.equal(p, das.trained[n]) and not p.requires_grad for n, p in fresh.items())


def test_another_learning_rate_or_other_weights_are_another_search(tmp_path):
    method = METHODS["block-influence"]()
    keys = []
    for more, change in (({}, 0.0), ({}, 0.0), ({"learning_rate": 1.0}, 0.0), ({"seed": 1}, 0.0), ({}, 0.1)):
        session = session_of("dual encoder", folder=tmp_path, **more)
        session.plain.visual_projection.weight.data += change
        keys.append(Journal.of(method, session, []).key)
    assert keys[0] == keys[1] and len(set(keys)) == 4


@pytest.mark.parametrize("name", ["random-skip", "block-influence"])
def test_what_nothing_has_trained_is_not_kept(name):
    session = session_of("decoder")
    method = METHODS[name](skip=1)
    method.prepare(session)
    method.attach(session.plain, session.anatomy)
    with pytest.raises(ValueError, match=r"nothing has trained the adapters in 'text'.*`adapters: none`.*das"):
        method.keep_trained(session.plain, ("text",))
    bare, session = METHODS[name](skip=1, adapters="none"), session_of("decoder")
    bare.prepare(session)
    bare.attach(session.plain, session.anatomy)
    bare.keep_trained(session.plain, ("text", "vision"))  # there are no adapters


def test_a_search_on_a_pruned_model_keeps_its_zeros(monkeypatch):
    session = session_of("decoder", learning_rate=0.1)
    weights = session.anatomy.weights(session.plain)
    for w in weights:
        w.of(session.plain).data[::2] = 0
    seen = {}

    def fit(self, with_task, steps, callbacks):
        history = BatchSession.fit(self, with_task, steps, callbacks)
        seen.update({n: p.clone() for n, p in with_task.named_parameters()})
        seen["trained"] = {n for n, p in with_task.named_parameters() if p.requires_grad}
        return history

    monkeypatch.setattr(session, "fit", partial(fit, session))
    METHODS["greedy-skip"](skip=1, search_steps=3).prepare(session)
    heads = tuple(f"{h}." for h in session.anatomy.heads)
    adapters = (".das_", ".adapter.", ".others.")
    assert seen["trained"] and all(any(a in n for a in adapters) or n.startswith(heads) for n in seen["trained"])
    for w in weights:
        copies = [p for n, p in seen.items() if n != "trained" and n.replace(".block.", ".", 1) == w.path]
        assert len(copies) == 1 and torch.equal(copies[0], w.of(session.plain))


@pytest.mark.parametrize("form", ["parallel", "sequential", "routed"])
def test_a_copied_model_computes_with_its_own_adapters(form):
    session = session_of("decoder")
    method = DAS(skip=1, plan=("model.language_model.layers.0",), towers=("text",), adapters=form)
    method.attach(session.plain, session.anatomy)
    model, batch = session.plain.eval(), next(session.batches("train"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch).loss
        for part in (".das_", ".adapter."):
            for name, parameter in other.named_parameters():
                if part in name:
                    parameter.normal_()
            changed = other(**batch).loss
            assert torch.equal(model(**batch).loss, before) and not torch.equal(changed, before), part
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(**batch).loss, changed)


# --- data -------------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).requires_grad_(False)
        self.out = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.out(self.frozen(x))[:, 0] - y).square().mean()}


ONE = {"x": torch.randn(3, 4), "y": torch.zeros(3)}


def regression(train: Any, validation: Any = None, **more: Any) -> BatchSession:
    return BatchSession(Regression(), Anatomy(()), train, validation, **more)


def take(session: BatchSession, count: int, split: Any = "train", size: int | None = None) -> list[dict[str, Any]]:
    batches = session.batches(split, size)
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "the train batches are empty"),
        (iter([ONE, ONE]), r"the train batches are used up: .*iterator \(list_iterator\).*a list, a DataLoader"),
        ([ONE, (ONE["x"],)], "train batch 2: expected a dict .*, found tuple"),
        ([ONE, {"x": ONE["x"]}], "train batch 2: lacks 'y', which the first batch had"),
    ],
)
def test_batches_that_cannot_be_used_are_named(train, message):
    with pytest.raises(ValueError, match=message):
        take(regression(train), 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ONE, "train: expected an iterable of batches.*put the one batch into a list"),
        (3, "train: expected an iterable of batches.*found a int"),
        (torch.utils.data.TensorDataset(ONE["x"]), "train: a TensorDataset gives single rows: pass `collate`"),
    ],
)
def test_data_of_no_known_kind_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        regression(data)


def test_what_was_not_given_is_asked_for():
    with pytest.raises(ValueError, match="validation: no data were given: pass `validation=`"):
        take(regression([ONE]), 1, "validation")
    with pytest.raises(ValueError, match=r"`with_task` \(Linear\) does not hold the plain model \(Regression\)"):
        regression([ONE], with_task=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no 'loss': give batches"):
        session = regression([ONE])
        session.loss(nn.Flatten(), {"input": ONE["x"]})
    with pytest.raises(ValueError, match=r"expected a scalar tensor, found the shape \(3,\)"):
        regression([ONE], loss=lambda out: torch.ones(3)).loss(session.with_task, ONE)


def test_an_example_takes_no_batch_from_an_iterator():
    session = regression(iter([{**ONE, "y": torch.full((3,), float(i))} for i in range(2)]))
    assert session.example()["y"][0] == 0 and session.example()["y"][0] == 0
    assert [float(b["y"][0]) for b in take(session, 2)] == [0, 1]


def collate(rows: list[tuple[int]]) -> dict[str, Tensor]:
    x = torch.tensor([float(i) for (i,) in rows])
    return {"x": x[:, None].expand(-1, 4), "y": x}


def test_rows_are_shuffled_by_the_seed_and_all_used():
    rows = torch.utils.data.TensorDataset(torch.arange(6.0))
    sessions = [regression(rows, rows, collate=collate, batch_size=2, seed=s) for s in (0, 0, 1)]
    orders = [[b["y"].tolist() for b in take(s, 6)] for s in sessions]
    assert orders[0] == orders[1] != orders[2]
    epochs = [sorted(i for batch in part for i in batch) for part in (orders[0][:3], orders[0][3:])]
    assert epochs == [[0, 1, 2, 3, 4, 5]] * 2
    assert len(take(sessions[0], 1, "validation", 4)[0]["y"]) == 4
    with pytest.raises(ValueError, match="validation dataset has 6 rows, but a batch of it takes 7"):
        take(sessions[0], 1, "validation", 7)
    with pytest.raises(ValueError, match="validation dataset is empty"):
        regression(rows, [], collate=collate)


# --- training ---------------------------------------------------------------------------------------------------------


class Told(TrainerCallback):
    def __init__(self):
        self.events: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            object.__getattribute__(self, "events").append(name)
        return object.__getattribute__(self, name)


def test_the_small_loop_trains_what_requires_gradients_and_tells_callbacks():
    session, told = regression([{**ONE, "y": torch.ones(3)}], learning_rate=0.1), Told()
    model = session.with_task.eval()
    before = values(model)
    history = session.fit(model, 20, [told])
    assert [h["step"] for h in history] == list(range(2, 21, 2)) and history[-1]["loss"] < 0.5 * history[0]["loss"]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {"out.weight", "out.bias"}, "statistics and dropout of frozen parts do not move"
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert [e for e in told.events if e != "on_log"] == ["on_train_begin", *step * 20, "on_train_end"]
    assert not model.training and session.fit(model, 0, []) == []


def test_a_loss_that_is_no_number_stops_the_loop():
    with pytest.raises(ValueError, match="the training loss is nan at step 1 of 3: lower `learning_rate`"):
        session = regression([{**ONE, "y": torch.full((3,), torch.nan)}])
        session.fit(session.with_task, 3, [])


def test_several_processes_need_a_trainer(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"one process, found WORLD_SIZE=2: pass a `transformers.Trainer`"):
        session = regression([ONE])
        session.fit(session.with_task, 3, [])


def test_a_function_or_a_trainer_trains_instead(tmp_path):
    calls = []
    session = regression([ONE], trainer=lambda model, steps, callbacks: calls.append((model, steps, callbacks)))
    assert session.fit(session.with_task, 3, ["callback"]) == [] and calls == [(session.with_task, 3, ["callback"])]

    class Mine(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return 0 * super().compute_loss(model, inputs) + model.out.bias.sum()

    out = tmp_path / "mine"
    args = TrainingArguments(out, num_train_epochs=1, learning_rate=0.1, report_to="none", use_cpu=True,
                             remove_unused_columns=False, lr_scheduler_type="constant", logging_steps=1,
                             disable_tqdm=True)  # fmt: skip
    rows = torch.utils.data.TensorDataset(torch.arange(6.0))
    mine = Mine(Regression(), args, train_dataset=rows, data_collator=collate)
    session, told = regression(rows, collate=collate, trainer=mine), Told()
    copied = copy.deepcopy(session.with_task)
    history = session.fit(copied, 3, [told])
    assert len(history) == 3 and told.events.count("on_step_end") == 3
    assert float((session.with_task.out.bias - copied.out.bias).detach()) == pytest.approx(0.3, abs=1e-4)
    assert args.max_steps != 3 and not any(out.iterdir()) and mine.state.global_step == 0
    with pytest.raises(ValueError, match="trainer: expected a function .* found int"):
        regression([ONE], trainer=3).fit(copied, 1, [])

    class Weighted(Mine):
        def __init__(self, *args, weight=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight = weight

        def compute_loss(self, model, inputs, **kwargs):
            return self.weight * super().compute_loss(model, inputs)

    heavy = Weighted(Regression(), args, train_dataset=rows, data_collator=collate, weight=-1.0)
    session = regression(rows, collate=collate, trainer=heavy)
    copied = copy.deepcopy(session.with_task)
    session.fit(copied, 3, [])
    assert float((session.with_task.out.bias - copied.out.bias).detach()) == pytest.approx(-0.3, abs=1e-4)

    class Twice(Weighted):  # its argument goes to the class above
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    heavy = Twice(Regression(), args, train_dataset=rows, data_collator=collate, weight=-0.5,
                  optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))  # fmt: skip
    copied = copy.deepcopy(session.with_task)
    regression(rows, collate=collate, trainer=heavy).fit(copied, 3, [])
    assert float((session.with_task.out.bias - copied.out.bias).detach()) == pytest.approx(-0.15, abs=1e-4)

    class Odd(Mine):
        def __init__(self, *args, odd=1, **kwargs):
            super().__init__(*args, **kwargs)

    class Log(Mine):  # an attribute of that name is there, and is another thing
        def __init__(self, *args, log=True, **kwargs):
            super().__init__(*args, **kwargs)

    class Tenfold(Mine):
        def __init__(self, *args, weight=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight = 10 * weight

    class Hidden(Mine):
        def __init__(self, *args, **kwargs):
            self.weight = kwargs.pop("weight", 1.0)
            super().__init__(*args, **kwargs)

    class Narrow(Mine):
        def __init__(self, model, args):
            super().__init__(model, args, train_dataset=rows)

    given = (Regression(), args)
    sgd = torch.optim.SGD(given[0].parameters(), lr=0.1)
    for made, why in ((Odd(*given, train_dataset=rows, odd=2), "to Odd as `odd` is not known: keep it"),
                      (Log(*given, train_dataset=rows), "to Log as `log` is not known: keep it"),
                      (Tenfold(*given, train_dataset=rows), "has weight 100.0, the first has 10.0"),
                      (Hidden(*given, train_dataset=rows, weight=2.0), "has weight 1.0, the first has 2.0"),
                      (Mine(*given, train_dataset=rows, optimizers=(sgd, None)), "it has an optimizer"),
                      (Narrow(*given), "a Narrow cannot be made again for another model")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{why}.*pass a function"):
            regression(rows, collate=collate, trainer=made).fit(copied, 1, [])

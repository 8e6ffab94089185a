"""Taps and streams: reading and changing values of a forward pass, in the model and in its copies."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from trimtab.anatomy import (
    AnatomyError,
    Block,
    Tap,
    argument,
    arguments,
    called_like,
    pick,
    pre_hook,
    put,
    read,
    read_stream,
    rewrite,
)


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


ONE, TWO, NEW = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ((ONE, TWO), 1),
        ([ONE, TWO], 1),
        ({"first": ONE, "second": TWO}, "second"),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=TWO), "hidden_states"),
        (BaseModelOutput(last_hidden_state=ONE, hidden_states=TWO), 1),
        (Pair(ONE, TWO), 1),
        (Pair(ONE, TWO), "second"),
    ],
)
def test_pick_and_put_reach_one_element_of_an_output(value, key):
    assert pick(value, key) is TWO
    out = put(value, key, NEW)
    assert type(out) is type(value)
    assert pick(out, key) is NEW and pick(out, "first" if value.__class__ is dict else 0) is ONE


def test_an_output_that_is_one_tensor_ignores_the_key():
    assert pick(ONE, 3) is ONE and put(ONE, 3, NEW) is NEW


# --- arguments and streams --------------------------------------------------------------------------------------------


class Second(nn.Module):
    """A block whose stream comes second."""

    def forward(self, mask: Tensor | None, hidden_states: Tensor, scale: float = 1.0, *, shift: float = 0.0, **rest):
        return hidden_states * scale + shift


class Plain(nn.Module):
    def forward(self, x: Tensor, memory: Tensor | None = None):
        return x


class Open(nn.Module):
    def forward(self, *args, **kwargs):
        return args[0] if args else kwargs["x"]


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((None, ONE), {}), ((None,), {"hidden_states": ONE}), ((), {"mask": None, "hidden_states": ONE}),
     ((), {"hidden_states": ONE, "mask": TWO}), ((TWO, ONE, 2.0), {"shift": 1.0})],
)  # fmt: skip
def test_the_stream_is_found_by_its_name_however_it_is_passed(args, kwargs):
    module, block = Second(), Block("b", 8)
    assert block.stream_of(module, args, kwargs) is ONE
    again, named = block.with_stream(module, args, kwargs, NEW)
    assert block.stream_of(module, again, named) is NEW and len(again) == len(args) and set(named) == set(kwargs)
    others = arguments(module, args, kwargs)
    assert {**arguments(module, again, named), "hidden_states": ONE} == others
    assert block.stream_of(module, args, kwargs) is ONE  # the call's own arguments are as they were


def test_the_stream_is_the_first_parameter_where_none_has_its_name():
    module, block = Plain(), Block("b", 8)
    for args, kwargs in (((ONE,), {}), ((), {"memory": TWO, "x": ONE}), ((ONE, TWO), {})):
        assert block.stream_of(module, args, kwargs) is ONE
        again, named = block.with_stream(module, args, kwargs, NEW)
        assert arguments(module, again, named) == {**arguments(module, args, kwargs), "x": NEW}
    assert Block("b", 8, stream="memory").stream_of(module, (ONE, TWO), {}) is TWO


def test_a_stream_that_is_not_passed_is_an_error_that_says_what_was():
    with pytest.raises(AnatomyError, match=r"block 'b' .Second.*expected 'hidden_states', found .mask=Tensor.2, 3..*;"):
        Block("b", 8).stream_of(Second(), (), {"mask": torch.zeros(2, 3)})
    with pytest.raises(AnatomyError, match=r"expected a tensor as its stream, argument 'x', found .tuple."):
        Block("b", 8).stream_of(Plain(), ((ONE, TWO),), {})
    with pytest.raises(AnatomyError, match=r"expected 'hidden_states', found .memory=Tensor\(\), x=Tensor"):
        Block("b", 8).with_stream(Open(), (), {"memory": TWO, "x": ONE}, NEW)  # nothing tells which of the two
    assert Block("b", 8).stream_of(Open(), (ONE, TWO), {}) is ONE


def test_a_stand_in_is_called_as_what_it_stands_for():
    module = Open()
    called_like(module, Second())
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert Block("b", 8).stream_of(one, (TWO, ONE), {}) is ONE
        assert argument(one, Tap("b", "input", 1), (), {"hidden_states": ONE, "mask": TWO}) is ONE


def test_a_forward_that_is_set_on_the_module_is_asked():
    module = Plain()
    module.forward = lambda memory, hidden_states: memory  # as hooks of Accelerate do
    assert Block("b", 8).stream_of(module, (TWO, ONE), {}) is ONE


def test_arguments_by_place_and_by_keyword():
    module = Second()
    assert argument(module, Tap("m", "input", 1), (TWO, ONE), {}) is ONE
    assert argument(module, Tap("m", "input", 1), (), {"hidden_states": ONE, "mask": TWO}) is ONE
    assert argument(module, Tap("m", "input", 0), (), {"hidden_states": ONE, "mask": TWO}) is TWO
    assert argument(module, Tap("m", "input", "mask"), (TWO, ONE), {}) is TWO  # by position
    assert argument(module, Tap("m", "input", "scale"), (TWO, ONE), {}) == 1.0  # its default
    assert argument(module, Tap("m", "input", "other"), (TWO, ONE), {}) is None  # any keyword can be passed
    assert argument(module, Tap("m", "input", "other"), (TWO, ONE), {"other": NEW}) is NEW


@pytest.mark.parametrize(
    ("module", "key", "kwargs"),
    [(Second(), 1, {"mask": TWO}), (Second(), "hidden_states", {"mask": TWO}), (Plain(), 2, {"x": ONE}),
     (Plain(), "attention_mask", {"x": ONE}), (Open(), 0, {"x": ONE})],
)  # fmt: skip
def test_an_argument_that_is_not_there_is_an_error_that_says_what_was(module, key, kwargs):
    with pytest.raises(
        AnatomyError, match=rf"module 'm' .*asks for input {key!r}, found \({next(iter(kwargs))}=Tensor"
    ):
        argument(module, Tap("m", "input", key), (), kwargs)


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_read_sees_inputs_and_goes_away():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    seen: list[torch.Tensor] = []
    handles = [read(model, Tap("1", side), seen.append) for side in ("input", "output")]
    out = model(torch.ones(1, 2))
    assert torch.equal(seen[0], model[0](torch.ones(1, 2))) and torch.equal(seen[1], out)
    for handle in handles:
        handle.remove()
    model(torch.ones(1, 2))
    assert len(seen) == 2


def test_inputs_cannot_be_rewritten():
    with pytest.raises(AnatomyError, match="only outputs can be rewritten, the tap at '0' is an input"):
        rewrite(nn.Sequential(nn.Linear(2, 2)), Tap("0", "input"), lambda x: x)


class Counter:
    """Remembers what it was told, scales what it is asked."""

    def __init__(self):
        self.seen: list[Tensor] = []
        self.scale = 2.0

    def note(self, value: Tensor) -> None:
        self.seen.append(value)

    def change(self, value: Tensor) -> Tensor:
        return value * self.scale

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(a * self.scale for a in args), kwargs


class Watched(nn.Module):
    """A model that keeps what its hooks call, as methods do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.adapter = nn.Linear(2, 2)
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def watch(self, how: str) -> None:
        hooks = {
            "read": lambda: read(self, Tap("layers.1"), self.counter.note),
            "read input": lambda: read(self, Tap("layers.1", "input"), self.counter.note),
            "read stream": lambda: read_stream(self, Block("layers.1", 2), self.counter.note),
            "partial": lambda: read(self, Tap("layers.1"), partial(Counter.note, self.counter)),
            "rewrite": lambda: rewrite(self, Tap("layers.0"), self.counter.change),
            "rewrite by a module": lambda: rewrite(self, Tap("layers.0"), self.adapter),
            "before": lambda: pre_hook(self, "layers.1", self.counter.before),
        }
        hooks[how]()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(
    "how", ["read", "read input", "read stream", "partial", "rewrite", "rewrite by a module", "before"]
)
def test_a_copy_calls_its_own(how, way):
    model, x = Watched(), torch.ones(1, 2)
    model.watch(how)
    twin = way(model)
    before = model(x).detach()
    assert torch.equal(twin(x), before)
    assert len(model.counter.seen) == len(twin.counter.seen) == ("read" in how or how == "partial")
    with torch.no_grad():
        for p in twin.adapter.parameters():
            p.add_(1)
    twin.counter.scale = 5.0
    moved = not torch.allclose(twin(x), before)
    assert moved == (how.startswith("rewrite") or how == "before")
    assert torch.equal(model(x), before)  # the original has kept its own
    twin(x).sum().backward()
    assert all((p.grad is not None) == (how == "rewrite by a module") for p in twin.adapter.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_may_call_its_blocks_by_keyword_with_the_stream_second():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Second() for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(mask=mask, hidden_states=x, scale=2.0)
            return x

    model, seen = Caller(), []
    block = Block("blocks.1", 2)
    read_stream(model, block, seen.append)
    model(ONE, TWO)
    assert seen == [2 * ONE]
    pre_hook(model, block.path, lambda m, args, kwargs: block.with_stream(m, args, kwargs, NEW))
    assert model(ONE, TWO) == 2 * NEW


def test_a_replica_of_data_parallel_is_refused():
    model = Watched()
    model.watch("rewrite")
    model.layers[0]._is_replica = True  # as nn.parallel.replicate marks its copies
    with pytest.raises(AnatomyError, match=r"'layers.0' runs in a replica of nn.DataParallel.*DistributedDataParallel"):
        model(torch.ones(1, 2))

"""Convolutions pruned on request: as the linear layers over patches that they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import trimtab
from tests.methods.test_prune import PRUNERS, STEPS
from tests.models.zoo import ZOO
from trimtab import Anatomy, Block, Masks, Tap, Tower
from trimtab.methods import METHODS
from trimtab.methods.prune import convolutions
from trimtab.methods.prune.calibration import Calibration
from trimtab.methods.prune.evidence import collect
from trimtab.methods.prune.scores import borrowed, matrix
from trimtab.methods.prune.settings import PruneSettings


class OnPatches(nn.Module):
    """A convolution with a 3 x 3 kernel, written as a linear layer on unfolded patches."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.stride = conv.stride
        self.linear = nn.Linear(conv.weight[0].numel(), conv.out_channels)
        self.linear.load_state_dict({"weight": conv.weight.detach().flatten(1), "bias": conv.bias.detach()})

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1, stride=self.stride).transpose(1, 2)  # (B, L, 9 C)
        side = (x.shape[2] + 2 - 3) // self.stride[0] + 1
        return self.linear(patches).transpose(1, 2).unflatten(2, (side, -1))


class Stack(nn.Module):
    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x).tanh()
        return {"loss": (x.mean(dim=(2, 3)) - torch.linspace(-1, 1, x.shape[1])).square().mean()}

    @property
    def anatomy(self) -> Anatomy:
        blocks = tuple(Block(f"blocks.{i}", 6) for i in range(len(self.blocks)))
        return Anatomy((Tower("vision", "vision", blocks, ("blocks",), Tap("blocks.0"), layout="grid"),))


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(
        [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, stride=2), nn.Conv2d(6, 5, 3, padding=1)]
    )


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 3, 8, 8, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("name", [n for n in PRUNERS if issubclass(METHODS[n].Settings, PruneSettings)])
def test_a_convolution_is_pruned_as_the_linear_layer_that_it_equals(name):
    conv = stack()
    linear = Stack([OnPatches(layer) for layer in conv.blocks])
    torch.testing.assert_close(conv(**batches()[0])["loss"], linear(**batches()[0])["loss"])
    settings = STEPS.get(name, {})
    torch.manual_seed(2)
    wanted = trimtab.prune(linear, name, 0.6, batches(), linear.anatomy, **settings).masks
    torch.manual_seed(2)
    found = trimtab.prune(conv, name, 0.6, batches(), conv.anatomy, convolutions=True, **settings).masks
    for i, layer in enumerate(conv.blocks):
        mask = found[f"blocks.{i}.weight"]
        assert mask.shape == layer.weight.shape
        assert torch.equal(mask.flatten(1), wanted[f"blocks.{i}.linear.weight"])
        assert not layer.weight[~mask].any()
        torch.testing.assert_close(layer.weight.flatten(1), linear.blocks[i].linear.weight, rtol=1e-3, atol=1e-4)


class PadsItself(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 2, 0)), self.weight, self.bias, self.stride)


KINDS = {
    "patch embedding": (lambda: nn.Conv2d(3, 6, 4, stride=4), (2, 3, 8, 8)),
    "1x1": (lambda: nn.Conv2d(3, 6, 1), (2, 3, 5, 4)),
    "strided, dilated, in groups": (lambda: nn.Conv2d(4, 6, 3, 2, 1, dilation=2, groups=2), (2, 4, 11, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "same, uneven": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 9)),
    "reflecting": (lambda: nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"), (2, 3, 6, 6)),
    "1d": (lambda: nn.Conv1d(4, 8, 3, padding=1, groups=2), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 2, 4, 4, 6)),
    "padding itself": (lambda: PadsItself(3, 6, 3, stride=2), (2, 3, 7, 7)),
}


@pytest.mark.parametrize("piece", [1, 1 << 22])
@pytest.mark.parametrize("name", list(KINDS))
def test_evidence_is_that_of_the_patches(name, piece, monkeypatch):
    """The patches are found from the outside: each is the gradient of one output with respect to the weight."""
    monkeypatch.setattr(convolutions, "_PIECE", piece)
    build, shape = KINDS[name]
    torch.manual_seed(0)
    model = nn.Sequential(build())
    x = torch.randn(shape)
    tower = Tower("vision", "vision", (Block("0", 6),), ("0",), Tap("0"))
    calibration = Calibration(model, model, Anatomy((tower,)), lambda: [])
    (weight,) = calibration.anatomy.weights(model, convolutions=True)
    model.forward = lambda x: model[0](x)
    evidence = collect(calibration, [weight], {"gram"}, [{"x": x}, {"x": 2 * x}])[weight]
    squares = collect(calibration, [weight], {"squares"}, [{"x": x}, {"x": 2 * x}])[weight]
    conv = model[0]
    assert len(evidence) == conv.groups and sum(e.rows for e in evidence) == conv.out_channels
    out = conv(x)
    for group, (part, only) in enumerate(zip(evidence, squares, strict=True)):
        row = group * conv.out_channels // conv.groups
        gradients = [torch.autograd.grad(y, conv.weight, retain_graph=True)[0] for y in out[:, row].flatten()]
        patches = torch.stack([g[row].flatten() for g in gradients])
        gram = patches.T @ patches * (1 + 4) / 4  # of two batches of two samples
        torch.testing.assert_close(part.gram, gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(only.squares, gram.diagonal(), rtol=1e-4, atol=1e-4)


def test_masks_are_kept_saved_and_loaded_in_the_convolutions_own_shape(tmp_path):
    model = stack().to(memory_format=torch.channels_last)
    before = [layer.weight.detach().clone() for layer in model.blocks]
    (masks,) = trimtab.prune(model, "snip", [0.5], batches(), model.anatomy, convolutions=True)
    assert all(torch.equal(layer.weight, was) for layer, was in zip(model.blocks, before, strict=True))
    masks.save(tmp_path / "masks.safetensors")
    again = Masks.read(tmp_path / "masks.safetensors", model)
    again.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    again.keep(model, optimizer)
    for batch in batches():
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for path, mask in masks.items():
        weight = model.get_parameter(path)
        assert torch.equal(mask, again[path]) and torch.equal(weight != 0, mask)
        assert weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="'blocks.1.weight' has the shape"):
        model.blocks[1] = nn.Conv2d(6, 6, 1)
        Masks.read(tmp_path / "masks.safetensors", model)


@pytest.mark.parametrize("name", ["itersnip", "sparsegpt"])
def test_pruners_that_write_to_weights_meanwhile_put_channels_last_back(name):
    model, plain = stack().to(memory_format=torch.channels_last), stack()
    settings = {"convolutions": True, **STEPS.get(name, {})}
    masks = [trimtab.prune(m, name, 0.5, batches(), m.anatomy, **settings).masks for m in (model, plain)]
    assert all(torch.equal(masks[0][path], mask) for path, mask in masks[1].items())
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in model.blocks)


def test_what_is_borrowed_is_what_the_model_computes_with():
    model = stack().to(memory_format=torch.channels_last)
    weights = model.anatomy.weights(model, convolutions=True)
    with borrowed(model, weights) as current:
        current[weights[1]].zero_()
        assert not model.blocks[1].weight.any()
    assert model.blocks[1].weight.all() and matrix(model, weights[1]).shape == (6, 54)


@pytest.mark.parametrize(
    ("name", "path", "weights"),
    [
        ("vilt", "vilt.embeddings.patch_embeddings.projection", 16 * 3 * 8 * 8),
        ("clip", "vision_model.embeddings.patch_embedding", 24 * 3 * 8 * 8),
        ("qwen2-vl", "model.visual.patch_embed.proj", 24 * 3 * 2 * 4 * 4),
    ],
)
@pytest.mark.parametrize("method", ["multiflow", "sparsegpt", "snip"])
def test_patch_embeddings_are_pruned_only_when_asked(name, path, weights, method):
    member = ZOO[name]
    plain = sum(count for _, _, count in member.towers.values())
    (whole,) = trimtab.prune(member.model(), method, [0.5], [member.batch], allow_empty_tower=True)
    assert f"{path}.weight" not in whole and whole.prunable == plain
    settings = {"convolutions": True, "allow_empty_tower": True}
    masks = trimtab.prune(model := member.model(), method, 0.5, [member.batch], **settings).masks
    assert masks.prunable == plain + weights and abs(masks.sparsity - 0.5) < 0.01
    parameter = model.get_parameter(f"{path}.weight")
    assert masks[f"{path}.weight"].shape == parameter.shape and not parameter[~masks[f"{path}.weight"]].any()


def test_a_saved_method_knows_that_it_pruned_convolutions():
    model = stack()
    masks = trimtab.prune(stack(), "omp", 0.5, anatomy=model.anatomy, convolutions=True).masks
    method = METHODS["omp"](convolutions=True)
    method.assume(model, model.anatomy)
    assert method.state["prunable"] == masks.prunable
    method.take(masks, model.anatomy)
    method.attach(model, model.anatomy)
    assert all(torch.equal(model.get_parameter(path) != 0, mask) for path, mask in masks.items())


def test_padded_text_does_not_reach_a_convolution_over_tokens():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(2))

        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x * mask[:, None])
            return x

    class Unmasked(Text):
        def forward(self, x, mask):
            for block in self.blocks:
                x = block(x)
            return x

    torch.manual_seed(0)
    model = Text()
    careless = Unmasked()
    careless.load_state_dict(model.state_dict())
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x = torch.randn(2, 4, 5)
    tower = Tower("text", "text", (Block("blocks.0", 4), Block("blocks.1", 4)), ("blocks",), Tap("blocks.1"),
                  mask=Tap("", "input", "mask"))  # fmt: skip
    found = []
    for m in (model, careless):
        calibration = Calibration(m, m, Anatomy((tower,)), lambda: [])
        weights = calibration.anatomy.weights(m, convolutions=True)[:1]
        found.append(collect(calibration, weights, {"squares"}, [{"x": x, "mask": mask}])[weights[0]][0].squares)
    torch.testing.assert_close(found[0], found[1])


def test_what_is_not_finite_or_not_there_is_named():
    model = stack()
    bad = batches(2)
    bad[1]["x"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"batch 2: the inputs of 'blocks\.0' are not finite"):
        trimtab.prune(model, "multiflow", 0.5, bad, model.anatomy, convolutions=True)
    with pytest.raises(ValueError, match="no linear layer .*convolutions without `convolutions`"):
        trimtab.prune(model, "multiflow", 0.5, bad, model.anatomy)
    spread = Stack([nn.ConvTranspose2d(3, 6, 3)])
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        trimtab.prune(spread, "omp", 0.5, anatomy=spread.anatomy, convolutions=True)

"""ResNet (He et al., CVPR 2016) and ResNeXt (Xie et al., CVPR 2017) of bottleneck blocks, with torchvision's key names.

    image (B, 3, H, W) -> stem /4 -> layer1 /4 -> layer2 /8 -> layer3 /16 -> layer4 /32

Two dialects are in use, and their tensors have the same shapes: torchvision's (the 3x3 convolution of a block has the
stride, the pooling after the stem pads) and that of Caffe's detectors (the first 1x1 convolution has the stride, the
pooling rounds up instead), from which bottom-up attention's features come.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.anatomy import Block, Tap, Tower

STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class ResNetSizes:
    """What makes one ResNet another.

    Attributes:
        layers: blocks in each of the four stages: (3, 4, 23, 3) for 101 layers.
        stem: channels after the first convolution; a stage puts out 4, 8, 16, 32 times as many.
        inner: channels inside the blocks of the first stage: 64, or 256 for ResNeXt 32x8d.
        groups: of the 3x3 convolutions: 1, or 32 for ResNeXt 32x8d.
        caffe: the dialect, see above.
        frozen: whether batch norms are constants (MDETR) and not modules of torch.
    """

    layers: tuple[int, ...] = (3, 4, 23, 3)
    stem: int = 64
    inner: int = 64
    groups: int = 1
    caffe: bool = False
    frozen: bool = False

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.stem * 32

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], prefix: str, caffe: bool, frozen: bool) -> ResNetSizes:
        """Read the sizes from tensors under `prefix` (`backbone.0.body.`, say).

        Raises:
            ValueError: if the stem or a stage is not there.
        """
        found = [re.match(re.escape(prefix) + r"layer(\d)\.(\d+)\.conv2\.weight", key) for key in state]
        blocks = [(int(m[1]), int(m[2])) for m in found if m]
        layers = tuple(len([b for s, b in blocks if s == stage]) for stage in (1, 2, 3, 4))
        if f"{prefix}conv1.weight" not in state or not all(layers):
            missing = [f"{prefix}conv1.weight"] if f"{prefix}conv1.weight" not in state else []
            missing += [f"{prefix}{name}.0.conv2.weight" for name, n in zip(STAGES, layers, strict=True) if not n]
            raise ValueError(f"expected a ResNet of four stages under '{prefix}', found no '{missing[0]}'")
        inner, in_group = state[f"{prefix}layer1.0.conv2.weight"].shape[:2]
        return cls(layers, len(state[f"{prefix}conv1.weight"]), inner, inner // in_group, caffe, frozen)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine map are constants (buffers), as DETR trains with."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut: (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, inner: int, out: int, stride: int, sizes: ResNetSizes):
        super().__init__()
        norm = FrozenBatchNorm2d if sizes.frozen else nn.BatchNorm2d
        first, second = (stride, 1) if sizes.caffe else (1, stride)
        self.conv1 = nn.Conv2d(channels, inner, 1, first, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, second, padding=1, groups=sizes.groups, bias=False)
        self.bn2 = norm(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = norm(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The network without its classifier: (B, 3, H, W) -> grid (B, 32 stem, H/32, W/32)."""

    def __init__(self, sizes: ResNetSizes):
        super().__init__()
        self.sizes = sizes
        self.conv1 = nn.Conv2d(3, sizes.stem, 7, 2, padding=3, bias=False)
        self.bn1 = (FrozenBatchNorm2d if sizes.frozen else nn.BatchNorm2d)(sizes.stem)
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if sizes.caffe else 1, ceil_mode=sizes.caffe)
        channels = sizes.stem
        for i, (name, blocks) in enumerate(zip(STAGES, sizes.layers, strict=True)):
            inner, out = sizes.inner * 2**i, sizes.stem * 4 * 2**i
            stage = []
            for block in range(blocks):
                stage.append(Bottleneck(channels, inner, out, 2 if i and not block else 1, sizes))
                channels = out
            setattr(self, name, nn.Sequential(*stage))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(pixels))))
        for name in STAGES:
            x = getattr(self, name)(x)
        return x


def tower(resnet: ResNet, path: str, pooled: Tap | None = None) -> Tower:
    """A ResNet at `path` of a model as the vision tower of its anatomy; the grid shrinks between stages."""
    blocks = [
        Block(f"{path}.{name}.{i}", block.conv3.out_channels, keeps_shape=block.downsample is None, stream="x")
        for name in STAGES
        for i, block in enumerate(getattr(resnet, name))
    ]
    return Tower("vision", "vision", tuple(blocks), (path,), output=Tap(f"{path}.layer4"), layout="grid", pooled=pooled)

"""CLIP's modified ResNet (Radford et al., ICML 2021, section 2.4) up to its last grid, under the published names.

Against a ResNet: a stem of three convolutions, and an average pooling before every convolution that would have strided.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """1x1, 3x3, pooling by the stride, 1x1 to four times the width; and the way around it."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.downsample = None
        if stride > 1 or channels != 4 * width:
            conv = nn.Conv2d(channels, 4 * width, 1, bias=False)
            layers = {"-1": nn.AvgPool2d(stride), "0": conv, "1": nn.BatchNorm2d(4 * width)}
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)).relu()
        out = self.bn3(self.conv3(F.avg_pool2d(out, self.stride) if self.stride > 1 else out))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class ClipResNet(nn.Module):
    """The trunk without the attention pooling behind it.

    Args:
        width: channels of the stem; RN50 64, RN50x4 80.
        layers: bottlenecks of the four stages; RN50 (3, 4, 6, 3), RN50x4 (4, 6, 10, 6).
    """

    def __init__(self, width: int, layers: Sequence[int]):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(layers):
            blocks = []
            for i in range(count):
                blocks.append(Bottleneck(channels, width * 2**stage, stride=2 if stage and not i else 1))
                channels = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 32 * width, H / 32, W / 32)."""
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        x = F.avg_pool2d(x, 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x

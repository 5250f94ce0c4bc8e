"""The segmenter's network: a sagittal U-Net that sees a slice with two to each side, and says what each pixel is.

2.5-D, since a 3-D network of the same strength takes minutes a scan on a hospital's two cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

WIDTHS: Final = (16, 32, 64, 96, 128)


class Twice(nn.Module):
    """Two convolutions of 3 x 3, each with BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, height, width) to (n, outputs, height, width)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)))


class SagittalUNet(nn.Module):
    """(n, channels, height, width) to logits (n, classes, height, width); sides are multiples of `2 ** (depth - 1)`."""

    def __init__(self, *, channels: int, classes: int, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.channels, self.classes, self.widths = channels, classes, tuple(widths)
        before = [channels, *widths[:-1]]
        self.down = nn.ModuleList(Twice(i, o) for i, o in zip(before, widths, strict=True))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(Twice(deep + shallow, shallow) for deep, shallow in pairs)
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        kept: list[Tensor] = []
        for number, block in enumerate(self.descending):
            x = block(x if number == 0 else torch.max_pool2d(x, 2))
            kept.append(x)
        for block, beside in zip(self.ascending, kept[-2::-1], strict=True):
            x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, beside], dim=1))
        logits: Tensor = self.head(x)
        return logits

    @property
    def descending(self) -> list[Twice]:
        """The blocks on the way down."""
        return [block for block in self.down if isinstance(block, Twice)]

    @property
    def ascending(self) -> list[Twice]:
        """The blocks on the way up."""
        return [block for block in self.up if isinstance(block, Twice)]

    @property
    def multiple(self) -> int:
        """What both sides of a picture have to be a multiple of."""
        return int(2 ** (len(self.widths) - 1))


def fresh(*, channels: int, classes: int, seed: int, widths: Sequence[int] = WIDTHS) -> SagittalUNet:
    """A network with He's random start."""
    network = SagittalUNet(channels=channels, classes=classes, widths=widths)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network

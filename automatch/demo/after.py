"""The same network after a refactoring: every number is computed as before, hardly any key is what it was.

The head is registered first and the encoder last; the encoder moved under ``backbone``; the decoder's dictionary of
blocks became nested lists with named parts; a dropout was inserted into the bottleneck, so that ``bottleneck.2`` is
still there, with the same shapes, and is another layer than it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from automatch.demo.before import CHANNELS, DoubleConv, Residual


class ConvNormAct(nn.Module):
    """Convolution, normalisation, activation, each with a name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class FusionNode(nn.Module):
    """Joins the tensors it is given, then convolves twice."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(inputs, outputs)
        self.conv2 = ConvNormAct(outputs, outputs)

    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.conv2(self.conv1(torch.cat(parts, 1)))


class NestedDecoder(nn.Module):
    """``levels[i][j]`` is what used to be ``blocks["x_i_j"]``."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        rows = len(channels) - 1
        self.levels = nn.ModuleList(
            nn.ModuleList(FusionNode(channels[i] * (j + 1) + channels[i + 1], channels[i]) for j in range(rows - i)) for i in range(rows)
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        below = [features[-1]]
        for level, feature in zip(reversed(list(self.levels)), reversed(features[:-1]), strict=True):
            row = [feature]
            for node, lower in zip(level.children(), below, strict=True):
                row.append(node([*row, nn.functional.interpolate(lower, scale_factor=2.0)]))
            below = row
        return below[-1]


class Backbone(nn.Module):
    """The encoder, one prefix deeper than before."""

    def __init__(self) -> None:
        super().__init__()
        widths = zip((1, *CHANNELS[:-1]), CHANNELS, strict=True)
        self.encoder = nn.ModuleList(DoubleConv(inputs, outputs) for inputs, outputs in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for depth, stage in enumerate(self.encoder):
            x = stage(nn.functional.max_pool2d(x, 2) if depth else x)
            features.append(x)
        return features


class SegmentationNetwork(nn.Module):
    """Head, decoder, bottleneck, backbone: the other way round."""

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.head = nn.Conv2d(CHANNELS[0], classes, 1)
        self.decoder = NestedDecoder()
        blocks = [Residual(CHANNELS[-1]) for _ in range(3)]
        self.bottleneck = nn.Sequential(blocks[0], nn.Dropout2d(dropout), *blocks[1:])
        self.backbone = Backbone()

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        features[-1] = self.bottleneck(features[-1])
        return self.head(self.decoder(features))


class MedicalSegmentationModel(nn.Module):
    """What the checkpoint has to load into."""

    def __init__(self, classes: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.model = SegmentationNetwork(classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

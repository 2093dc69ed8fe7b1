"""The class as it was when the checkpoint was written: a U-Net++ with keys like ``model.decoder.blocks.x_0_0.conv1.1.bias``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = (8, 12, 16, 24)


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class DoubleConv(nn.Module):
    """Two convolutions; the second one keeps the width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = conv_block(inputs, outputs)
        self.conv2 = conv_block(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Residual(nn.Module):
    """A block of the bottleneck: all of them have the same shapes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = DoubleConv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class UnetPlusPlusDecoder(nn.Module):
    """Node ``x_i_j`` joins everything before it in row ``i`` with the upsampled node below."""

    def __init__(self, channels: tuple[int, ...] = CHANNELS) -> None:
        super().__init__()
        self.rows = len(channels) - 1
        self.blocks = nn.ModuleDict()
        for column in range(self.rows):
            for row in range(self.rows - column):
                inputs = channels[row] * (column + 1) + channels[row + 1]
                self.blocks[f"x_{row}_{column}"] = DoubleConv(inputs, channels[row])

    def forward(self, features: list[Tensor]) -> Tensor:
        rows = [[feature] for feature in features]
        for column in range(self.rows):
            for row in range(self.rows - column):
                below = nn.functional.interpolate(rows[row + 1][column], scale_factor=2.0)
                rows[row].append(self.blocks[f"x_{row}_{column}"](torch.cat([*rows[row], below], 1)))
        return rows[0][-1]


class UnetPlusPlus(nn.Module):
    """Encoder, bottleneck, decoder, head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(DoubleConv(inputs, outputs) for inputs, outputs in zip((1, *CHANNELS[:-1]), CHANNELS, strict=True))
        self.bottleneck = nn.Sequential(*(Residual(CHANNELS[-1]) for _ in range(3)))
        self.decoder = UnetPlusPlusDecoder()
        self.segmentation_head = nn.Sequential(nn.Conv2d(CHANNELS[0], classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        features: list[Tensor] = []
        for depth, stage in enumerate(self.encoder):
            x = stage(nn.functional.max_pool2d(x, 2) if depth else x)
            features.append(x)
        features[-1] = self.bottleneck(features[-1])
        return self.segmentation_head(self.decoder(features))


class MedicalSegmentationModel(nn.Module):
    """What was trained; stands for a LightningModule, which it does not need to be."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.model = UnetPlusPlus(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

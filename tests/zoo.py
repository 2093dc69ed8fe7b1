"""Tiny models with the shapes of trouble: equal shapes in a row, tied weights, buffers, attention, convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from automatch.demo.after import MedicalSegmentationModel as RefactoredUnet
from automatch.demo.before import MedicalSegmentationModel as Unet


class Mlp(nn.Module):
    """A stack of linear layers of one width, then another head."""

    def __init__(self, width: int = 8, depth: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class ConvNet(nn.Module):
    """Convolutions with batch normalisation, so with buffers."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 6), classes: int = 3) -> None:
        super().__init__()
        pairs = zip((3, *widths[:-1]), widths, strict=True)
        self.features = nn.Sequential(*(nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o)) for i, o in pairs))
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((-2, -1)))


class Block(nn.Module):
    """A transformer block with separate projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.o_proj(nn.functional.scaled_dot_product_attention(self.q_proj(y), self.k_proj(y), self.v_proj(y)))
        return x + self.down(self.up(self.norm2(x)).relu())


class TiedLanguageModel(nn.Module):
    """A transformer whose output layer is its embedding, with a buffer that no training changes."""

    positions: Tensor

    def __init__(self, vocabulary: int = 11, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("positions", torch.arange(16))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.output(x)


ZOO: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "convnet": ConvNet,
    "tied": TiedLanguageModel,
    "recurrent": lambda: nn.LSTM(4, 6, num_layers=2, bidirectional=True),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "unet": Unet,
    "refactored-unet": RefactoredUnet,
}

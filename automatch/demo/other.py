"""Another architecture for the same task: what must be refused."""

from __future__ import annotations

from torch import Tensor, nn


class PatchTransformer(nn.Module):
    """A small vision transformer that paints a mask patch by patch."""

    def __init__(self, classes: int = 1, patch: int = 8, width: int = 64, depth: int = 4, patches: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Embedding(patches, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.layers = nn.ModuleList([layer, *(nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True) for _ in range(depth - 1))])
        self.painter = nn.Linear(width, classes * patch * patch)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x).flatten(2).transpose(1, 2) + self.positions.weight
        for layer in self.layers:
            tokens = layer(tokens)
        return nn.functional.fold(self.painter(tokens).transpose(1, 2), x.shape[-2:], self.patch, stride=self.patch)

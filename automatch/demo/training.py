"""Synthetic images, a short training, a metric, and a checkpoint laid out as Lightning's are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

SIZE = 32


def synthetic_scans(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy scans of ``SIZE`` x ``SIZE`` pixels with bright elliptic lesions, and their masks, both ``(count, 1, SIZE, SIZE)``."""
    random = torch.Generator().manual_seed(seed)
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    masks = torch.zeros(count, 1, SIZE, SIZE)
    for mask in masks:
        for _ in range(int(torch.randint(1, 4, (), generator=random))):
            center = torch.rand(2, generator=random) * (SIZE - 12) + 6
            radius = torch.rand(2, generator=random) * 4 + 2.5
            mask[0][((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2 < 1] = 1.0
    shading = (torch.sin(x / 5) + torch.cos(y / 4)) / 4
    images = masks * 0.8 + shading + 0.5 * torch.randn(masks.shape, generator=random)
    return images, masks


def train(model: nn.Module, *, epochs: int, seed: int) -> torch.optim.Optimizer:
    """Train in place on 96 images and return the optimizer, whose state belongs into a checkpoint."""
    images, masks = synthetic_scans(96, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shuffle = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=shuffle).split(16):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(images[batch]), masks[batch]).backward()
            optimizer.step()
    return optimizer


@torch.no_grad()
def dice(model: nn.Module, *, seed: int) -> float:
    """The Dice coefficient in [0, 1] on 32 images that were not trained on."""
    images, masks = synthetic_scans(32, seed=seed + 1)
    model.eval()
    found = (model(images) > 0).float()
    return float(2 * (found * masks).sum() / (found.sum() + masks.sum()))


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, *, epochs: int) -> None:
    """Write what Lightning's ``ModelCheckpoint`` writes."""
    checkpoint = {
        "epoch": epochs - 1,
        "global_step": epochs * 6,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": model.state_dict(),
        "callbacks": {},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"classes": 1},
    }
    torch.save(checkpoint, path)

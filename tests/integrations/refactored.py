"""A Lightning module and its refactored successor, for runs in this process and in several."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automatch.transforms import Concat


def batches() -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 6, generator=generator, dtype=torch.float64)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :2].tanh()), batch_size=8)


def modules(pl: Any, optimizer: str, groups: int, *extra_bases: type) -> tuple[type, type]:
    """A module and its refactored successor: renamed, re-nested, re-ordered, with two layers fused into one."""

    class Base(*extra_bases, pl.LightningModule):
        def __init__(self, width: int = 4, lr: float = 1e-2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.losses: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        test_step = training_step

        def configure_optimizers(self) -> Any:
            parameters: list[Any] = list(self.parameters())
            if groups == 2:
                decayed, plain = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim == 1]
                parameters = [{"params": decayed, "weight_decay": 1e-2}, {"params": plain, "lr": self.hparams.lr / 2}]
            if optimizer == "adam":
                made: Any = torch.optim.Adam(parameters, lr=self.hparams.lr)
            else:
                made = torch.optim.SGD(parameters, lr=self.hparams.lr, momentum=0.9)
            return [made], [torch.optim.lr_scheduler.StepLR(made, 1, 0.8)]

    class V1(Base):
        def __init__(self, width: int = 4, lr: float = 1e-2) -> None:
            super().__init__(width, lr)
            self.query, self.key = nn.Linear(6, width), nn.Linear(6, width)
            self.norm = nn.BatchNorm1d(width)
            self.out = nn.Linear(width, 2)
            self.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(self.query(x) * self.key(x)).relu())

    class V2(Base):
        def __init__(self, width: int = 4, lr: float = 1e-2) -> None:
            super().__init__(width, lr)
            self.head = nn.ModuleDict({"classifier": nn.Linear(width, 2)})
            self.body = nn.ModuleDict({"bn": nn.BatchNorm1d(width), "query_key": nn.Linear(6, 2 * width)})
            self.double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query, key = self.body["query_key"](x).chunk(2, -1)
            return self.head["classifier"](self.body["bn"](query * key).relu())

    V1.__qualname__, V2.__qualname__ = "V1", "V2"
    return V1, V2


FEEDS = {
    "head.classifier.weight": "out.weight",
    "head.classifier.bias": "out.bias",
    **{f"body.bn.{leaf}": f"norm.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
    "body.query_key.weight": (("query.weight", "key.weight"), Concat(0)),
    "body.query_key.bias": (("query.bias", "key.bias"), Concat(0)),
}

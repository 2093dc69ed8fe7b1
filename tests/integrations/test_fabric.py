"""Lightning Fabric's own loop: saved under one class, resumed under the refactored one, all of it or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import automatch
from automatch.errors import LoadError, MappingError

fabric_module = pytest.importorskip("lightning.fabric")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its own imports


class Moving(nn.Module):
    """Linear layers that run in the order of their names, in whatever order they are registered."""

    def __init__(self, names: tuple[str, str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in sorted(self.named_children()):
            x = child[1](x)
        return x


class Run:
    """A model, its optimizer, scheduler and average, as a training script has them."""

    def __init__(self, names: tuple[str, str], optimizer: Any = torch.optim.Adam, compiled: bool = False) -> None:
        self.fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
        self.plain = Moving(names)
        made = torch.compile(self.plain, backend="eager") if compiled else self.plain
        self.model, self.optimizer = self.fabric.setup(made, optimizer(self.plain.parameters(), lr=0.1))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.ema = AveragedModel(self.plain, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.state = {"ema": self.ema, "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "epoch": 0}

    def steps(self, number: int) -> list[float]:
        losses = []
        for _ in range(number):
            loss = self.model(torch.ones(2, 3)).square().sum()
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.ema.update_parameters(self.plain)
            losses.append(loss.item())
        return losses


FEEDS = {f"{target}.{leaf}": f"{source}.{leaf}" for target, source in (("x", "a"), ("y", "b")) for leaf in ("weight", "bias")}


@pytest.fixture
def old(tmp_path) -> Run:
    run = Run(("a", "b"))
    run.steps(3)
    run.fabric.save(tmp_path / "f.ckpt", {**run.state, "epoch": 4, "note": "kept"})
    return run


def mapping_for(run: Run, tmp_path: Any) -> automatch.KeyMapping:
    return mapping_of(run.plain, torch.load(tmp_path / "f.ckpt", weights_only=False)["model"], FEEDS)


@pytest.mark.parametrize("compiled", [False, True])
def test_everything_that_a_script_keeps_goes_on(old, compiled, tmp_path):
    expected = old.steps(4)
    new = Run(("y", "x"), compiled=compiled)  # registered the other way round
    rest = automatch.lightning.fabric_load(new.fabric, tmp_path / "f.ckpt", new.state, mapping=mapping_for(new, tmp_path))
    assert (rest, new.state["epoch"]) == ({"note": "kept"}, 4)
    assert new.steps(4) == pytest.approx(expected, rel=1e-6)
    assert new.scheduler.get_last_lr() == old.scheduler.get_last_lr()
    assert int(new.ema.n_averaged) == 7
    assert torch.allclose(new.ema.module.x.weight, old.ema.module.a.weight, atol=1e-6)


def everything(run: Run) -> tuple[Any, ...]:
    return run.optimizer.state_dict(), run.scheduler.state_dict(), run.state["epoch"]


def test_a_refused_checkpoint_leaves_everything_as_it_was(old, tmp_path):
    new = Run(("y", "x"))
    mapping = mapping_for(new, tmp_path)
    before, average, others = snapshot_of(new.plain), snapshot_of(new.ema), everything(new)

    def refused(error: type[Exception], match: str, **given: Any) -> None:
        with pytest.raises(error, match=match):
            automatch.lightning.fabric_load(new.fabric, tmp_path / "f.ckpt", **{"state": new.state, "mapping": mapping, **given})
        assert_unchanged(new.plain, before)
        assert_unchanged(new.ema, average)
        assert everything(new) == others

    refused(LoadError, "'x.bias'", mapping=mapping.decide("x.bias", None))
    refused(LoadError, "'gone' is not in the checkpoint", state={**new.state, "gone": 1})
    refused(LoadError, "no module in state is in the checkpoint", state={"optimizer": new.optimizer})
    two_groups = torch.optim.Adam([{"params": new.plain.x.parameters()}, {"params": new.plain.y.parameters()}])
    refused(MappingError, "has 1 parameter groups, the new one has 2", state={**new.state, "optimizer": two_groups})
    refused(MappingError, "no parameter of Moving", state={**new.state, "optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters())})


class Stubborn:
    """An object that has changed when it refuses its state."""

    def __init__(self) -> None:
        self.level = 1

    def state_dict(self) -> dict[str, int]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.level = state["level"]
        if self.level == 2:
            raise ValueError("two is too much")


@pytest.mark.parametrize("refuses", ["optimizer", "stubborn", "ema", "model"])
def test_an_object_that_refuses_its_state_leaves_all_others_as_they_were(old, refuses, tmp_path, monkeypatch):
    saved, new = Stubborn(), Run(("y", "x"))
    saved.level = 2 if refuses == "stubborn" else 3
    old.fabric.save(tmp_path / "f.ckpt", {**old.state, "stubborn": saved})
    mapping, stubborn = mapping_for(new, tmp_path), Stubborn()
    new.state["stubborn"] = stubborn
    before, average, others = snapshot_of(new.plain), snapshot_of(new.ema), everything(new)

    takes = new.optimizer.optimizer.load_state_dict

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room")

    def half(state: Any) -> None:
        takes(state)
        if state["state"]:
            fail()

    if refuses == "optimizer":
        monkeypatch.setattr(new.optimizer.optimizer, "load_state_dict", half)
    elif refuses != "stubborn":
        module = new.ema.module if refuses == "ema" else new.plain
        monkeypatch.setattr(module.x, "_load_from_state_dict", fail)
    with pytest.raises(LoadError, match="two is too much" if refuses == "stubborn" else "no room"):
        automatch.lightning.fabric_load(new.fabric, tmp_path / "f.ckpt", new.state, mapping=mapping)
    monkeypatch.undo()
    assert_unchanged(new.plain, before)
    assert_unchanged(new.ema, average)
    assert everything(new) == others
    assert stubborn.level == 1


def test_an_object_that_cannot_be_put_back_is_named(old, tmp_path, monkeypatch):
    new = Run(("y", "x"))

    def fail(*_: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(new.scheduler, "load_state_dict", fail)
    with pytest.raises(LoadError, match="'scheduler' did not take its state") as error:
        automatch.lightning.fabric_load(new.fabric, tmp_path / "f.ckpt", new.state, mapping=mapping_for(new, tmp_path))
    assert error.value.__notes__ == ["'scheduler' did not take its own old state either and may have changed: no room"]
    assert new.optimizer.state_dict()["state"] == {}


def test_other_networks_must_fit_as_they_are(tmp_path):
    run, critic = Run(("a", "b")), nn.Linear(3, 1)
    run.steps(1)
    judging = torch.optim.SGD(critic.parameters(), lr=0.5, momentum=0.9)
    critic(torch.ones(1, 3)).sum().backward()
    judging.step()
    run.fabric.save(tmp_path / "gan.ckpt", {"model": run.model, "critic": critic, "opt": run.optimizer, "critic_opt": judging})
    new = Run(("y", "x"))
    mapping = mapping_of(new.plain, run.plain.state_dict(), FEEDS)

    def loaded(judge: nn.Module) -> nn.Module:
        again = torch.optim.SGD(judge.parameters(), lr=0.1, momentum=0.9)
        state = {"model": new.model, "critic": judge, "critic_opt": again, "opt": new.optimizer}
        assert automatch.lightning.fabric_load(new.fabric, tmp_path / "gan.ckpt", state, mapping=mapping) == {}
        assert torch.equal(again.state[judge.weight]["momentum_buffer"], torch.ones(1, 3))
        return judge

    assert torch.equal(loaded(nn.Linear(3, 1)).weight, critic.weight)
    assert torch.equal(new.optimizer.state[new.plain.x.bias]["exp_avg"], run.optimizer.state[run.plain.a.bias]["exp_avg"])
    before = snapshot_of(new.plain)
    with pytest.raises(LoadError, match=r"keys and shapes for 'critic' are not those of the ModuleDict.*a fabric_load of its own"):
        loaded(nn.ModuleDict({"fc": nn.Linear(3, 1)}))
    assert_unchanged(new.plain, before)
    renamed = nn.ModuleDict({"fc": nn.Linear(3, 1)})
    rest = automatch.lightning.fabric_load(new.fabric, tmp_path / "gan.ckpt", {"critic": renamed}, threshold=0.5, weights_only=True)
    assert torch.equal(renamed["fc"].weight, critic.weight)
    assert set(rest) == {"model", "opt", "critic_opt"}

"""Runs of real Lightning, with both of its packages: trained under one class, resumed under the refactored one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from refactored import FEEDS, batches, modules
from torch import nn

import automatch
from automatch.errors import LoadError

PACKAGES = [
    name for name in ("lightning.pytorch", "pytorch_lightning") if __import__("importlib.util").util.find_spec(name.partition(".")[0])
]
pytestmark = [
    pytest.mark.skipif(not PACKAGES, reason="Lightning is not installed"),
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice about workers, loggers and its own imports
]


@pytest.fixture(params=PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    return import_module(request.param)


def fit(pl: Any, model: Any, epochs: int, tmp_path: Any, callbacks: list[Any], ckpt_path: Any = None) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **quiet)
    trainer.fit(model, batches(), ckpt_path=ckpt_path)
    return trainer


def trained(pl: Any, v1: type, tmp_path: Any, callbacks: list[Any] | None = None) -> Any:
    """The checkpoint of three epochs under the first class."""
    pl.seed_everything(7, verbose=False)
    path = tmp_path / "v1.ckpt"
    fit(pl, v1(), 3, tmp_path, callbacks or []).save_checkpoint(path)
    return path


def averaging(pl: Any) -> Any:
    from torch.optim.swa_utils import get_ema_avg_fn

    return pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.7))


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "ema"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_resumes_step_for_step(pl, optimizer, groups, ema, tmp_path):
    v1, v2 = modules(pl, optimizer, groups)
    path = trained(pl, v1, tmp_path, [averaging(pl)] if ema else None)
    unchanged, refactored = v1(), v2()
    first = fit(pl, unchanged, 6, tmp_path, [averaging(pl)] if ema else [], path)
    mapping = mapping_of(refactored, torch.load(path)["state_dict"], FEEDS)
    match = automatch.lightning.AutoMatch(mapping=mapping)
    second = fit(pl, refactored, 6, tmp_path, [match, averaging(pl)] if ema else [match], path)
    assert len(unchanged.losses) == 18
    assert refactored.losses == pytest.approx(unchanged.losses, rel=1e-9)
    assert match.report.loaded == refactored_keys(refactored)
    assert [g["lr"] for g in second.optimizers[0].param_groups] == [g["lr"] for g in first.optimizers[0].param_groups]
    assert (second.current_epoch, second.global_step) == (6, 36)
    # after the run the averages, where there are any, have been put into the modules
    x = torch.ones(3, 6, dtype=torch.float64)
    assert torch.allclose(refactored.eval()(x), unchanged.eval()(x), rtol=1e-9)


def refactored_keys(model: nn.Module) -> tuple[str, ...]:
    return tuple(model.state_dict())


def test_without_automatch_lightning_refuses(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 1)
    path = trained(pl, v1, tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(pl, v2(), 6, tmp_path, [], path)


def test_the_mixin_needs_nothing_else(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 2)
    path = trained(pl, v1, tmp_path)

    class Mixed(*modules(pl, "adam", 2, automatch.lightning.AutoMatchMixin)[1:]):
        automatch_options = {"mapping": mapping_of(v2(), torch.load(path)["state_dict"], FEEDS)}  # noqa: RUF012

    unchanged, mixed = v1(), Mixed()
    fit(pl, unchanged, 6, tmp_path, [], path)
    fit(pl, mixed, 6, tmp_path, [], path)
    assert mixed.losses == pytest.approx(unchanged.losses, rel=1e-9)
    assert torch.equal(Mixed.load_from_checkpoint(path).head["classifier"].weight, v1.load_from_checkpoint(path).out.weight)


def test_test_and_predict_load_too(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 1)
    path = trained(pl, v1, tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    unchanged, refactored = v1(), v2()
    match = automatch.lightning.AutoMatch(mapping=mapping_of(refactored, torch.load(path)["state_dict"], FEEDS))
    pl.Trainer(**quiet).test(unchanged, batches(), ckpt_path=path, verbose=False)
    pl.Trainer(callbacks=[match], **quiet).test(refactored, batches(), ckpt_path=path, verbose=False)
    assert refactored.losses == pytest.approx(unchanged.losses, rel=1e-9)
    assert "on_load_checkpoint" not in vars(refactored)


def test_a_refused_checkpoint_leaves_the_module_as_it_was(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 1)
    path = trained(pl, v1, tmp_path)
    refactored = v2()
    feeds = {key: value for key, value in FEEDS.items() if "classifier" not in key}
    match = automatch.lightning.AutoMatch(mapping=mapping_of(refactored, torch.load(path)["state_dict"], feeds))
    before = snapshot_of(refactored)
    with pytest.raises(LoadError, match=r"'head.classifier.weight': nothing in the checkpoint feeds it"):
        fit(pl, refactored, 6, tmp_path, [match], path)
    assert_unchanged(refactored, before)
    lenient = automatch.lightning.AutoMatch(mapping=match._remapper.options["mapping"], pins={"head.classifier.bias": None}, strict=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(callbacks=[lenient], **quiet).test(refactored, batches(), ckpt_path=path, verbose=False)
    assert torch.equal(refactored.head["classifier"].weight, before["head.classifier.weight"][1])
    assert lenient.report.to_train_keys == ("head.classifier.weight", "head.classifier.bias")


def test_load_from_checkpoint_with_hyperparameters(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 1)
    pl.seed_everything(7, verbose=False)
    path = tmp_path / "wide.ckpt"
    old = v1(width=5, lr=0.5)
    fit(pl, old, 1, tmp_path, []).save_checkpoint(path)
    mapping = mapping_of(v2(width=5), torch.load(path)["state_dict"], FEEDS)
    before = v2.on_load_checkpoint
    model = automatch.lightning.load_from_checkpoint(v2, path, map_location="cpu", mapping=mapping, lr=0.25)
    assert type(model) is v2
    assert (model.hparams.width, model.hparams.lr) == (5, 0.25)
    x = torch.ones(3, 6, dtype=torch.float64)
    assert torch.allclose(model.eval()(x), old.eval()(x), rtol=1e-12)
    assert v2.on_load_checkpoint is before
    with pytest.raises(automatch.MappingError, match="made for another model"):
        automatch.lightning.load_from_checkpoint(v2, path, mapping=mapping, width=6)
    with pytest.raises(RuntimeError, match="Missing key"):
        v2.load_from_checkpoint(path)


def test_a_renamed_module_is_proposed_for(pl, tmp_path):
    class Before(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    class After(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))

    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    old = Before()
    trainer.strategy.connect(old)
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    new = automatch.lightning.load_from_checkpoint(After, tmp_path / "old.ckpt", threshold=0.5)
    assert torch.equal(new.model(torch.eye(3)), old.net(torch.eye(3)))


def test_the_snapshot_callback_and_what_it_is_good_for(pl, tmp_path):
    """Frozen twins of one shape: which of them the optimizer held is known from the snapshot alone."""

    class Twins(pl.LightningModule):
        def __init__(self, names: tuple[str, str, str] = ("a", "b", "c"), frozen: str = "b") -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Linear(6, 6, bias=False) for name in names})
            self.layers[frozen].requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in sorted(self.layers):
                x = self.layers[name](x)
            return x

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self(batch[0].float()).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    sample = torch.ones(2, 6)
    old = Twins()
    trainer = fit(pl, old, 1, tmp_path, [automatch.lightning.SaveSnapshot(sample)])
    path = tmp_path / "twins.ckpt"
    trainer.save_checkpoint(path)
    snapshot = automatch.read_snapshot(path)
    assert snapshot.optimizers == (("layers.a.weight", "layers.c.weight"),)
    assert torch.equal(snapshot.golden.outputs[0], old.eval()(sample))
    assert type(torch.load(path, weights_only=True)["automatch_snapshot"]) is dict

    new = Twins(("z", "y", "x"), frozen="y")
    feeds = {f"layers.{new_name}.weight": f"layers.{old_name}.weight" for new_name, old_name in ("xa", "yb", "zc")}
    mapping = mapping_of(new, torch.load(path)["state_dict"], feeds)
    assert mapping.verify(new, path)
    resumed = fit(pl, new, 2, tmp_path, [automatch.lightning.AutoMatch(mapping=mapping)], path)
    again = Twins()
    expected = fit(pl, again, 2, tmp_path, [], path)
    assert torch.allclose(new.layers["z"].weight, again.layers["c"].weight, atol=1e-6)
    moments = [resumed.optimizers[0].state[new.layers["x"].weight], expected.optimizers[0].state[again.layers["a"].weight]]
    assert torch.allclose(moments[0]["exp_avg"], moments[1]["exp_avg"], atol=1e-6)


def test_a_sample_that_fails_costs_no_run(pl, tmp_path):
    v1, _ = modules(pl, "adam", 1)
    with pytest.raises(TypeError, match="a object cannot be kept"):
        automatch.lightning.SaveSnapshot((torch.ones(1), object()))
    trainer = fit(pl, v1(), 1, tmp_path, [automatch.lightning.SaveSnapshot(torch.ones(2, 99))])
    with pytest.warns(UserWarning, match="snapshot has no golden batch: V1 failed on the sample batch"):
        trainer.save_checkpoint(tmp_path / "v1.ckpt")
    snapshot = automatch.read_snapshot(tmp_path / "v1.ckpt")
    assert (snapshot.golden, len(snapshot.optimizers)) == (None, 1)


def test_stochastic_weight_averaging_resumes(pl, tmp_path):
    v1, v2 = modules(pl, "sgd", 1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}

    def run(model: Any, epochs: int, ckpt_path: Any = None, *callbacks: Any) -> Any:
        averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1, annealing_epochs=2)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "swa-{epoch}", save_top_k=-1)
        trainer = pl.Trainer(max_epochs=epochs, callbacks=[*callbacks, averaging, saving], **quiet)
        trainer.fit(model, batches(), ckpt_path=ckpt_path)
        return trainer

    pl.seed_everything(7, verbose=False)
    run(v1(), 6)
    path = tmp_path / "swa-epoch=2.ckpt"
    assert torch.load(path, weights_only=False)["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    unchanged, refactored = v1(), v2()
    run(unchanged, 6, path)
    match = automatch.lightning.AutoMatch(mapping=mapping_of(refactored, torch.load(path, weights_only=False)["state_dict"], FEEDS))
    run(refactored, 6, path, match)
    assert refactored.losses == pytest.approx(unchanged.losses, rel=1e-9)
    assert torch.allclose(refactored.body["bn"].running_var, unchanged.norm.running_var, rtol=1e-9)
    assert torch.allclose(refactored.head["classifier"].weight, unchanged.out.weight, rtol=1e-9)


def test_several_optimizers_each_follow(pl, tmp_path):
    class Pair(pl.LightningModule):
        def __init__(self, names: tuple[str, str]) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.losses: list[float] = []
            self.order = sorted(names)
            for name in names:
                setattr(self, name, nn.Linear(6, 6).double())

        def training_step(self, batch: Any, _: int) -> None:
            first, second = (getattr(self, name) for name in self.order)
            for optimizer in self.optimizers():
                loss = (second(first(batch[0]).relu()) - batch[0]).square().mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                self.losses.append(loss.item())

        def configure_optimizers(self) -> Any:
            first, second = (getattr(self, name) for name in self.order)
            return [torch.optim.Adam(first.parameters(), lr=0.01), torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)]

    pl.seed_everything(7, verbose=False)
    path = tmp_path / "pair.ckpt"
    fit(pl, Pair(("a", "b")), 2, tmp_path, []).save_checkpoint(path)
    unchanged, renamed = Pair(("a", "b")), Pair(("y", "x"))
    feeds = {f"{new}.{leaf}": f"{old}.{leaf}" for new, old in ("xa", "yb") for leaf in ("weight", "bias")}
    mapping = mapping_of(renamed, torch.load(path)["state_dict"], feeds)
    fit(pl, unchanged, 4, tmp_path, [], path)
    fit(pl, renamed, 4, tmp_path, [automatch.lightning.AutoMatch(mapping=mapping)], path)
    assert renamed.losses == pytest.approx(unchanged.losses, rel=1e-9)


def test_optimizer_states_that_cannot_follow_leave_the_module_as_it_was(pl, tmp_path):
    v1, v2 = modules(pl, "adam", 2)
    path = trained(pl, v1, tmp_path)
    refactored = modules(pl, "adam", 1)[1]()
    before = snapshot_of(refactored)
    match = automatch.lightning.AutoMatch(mapping=mapping_of(v2(), torch.load(path)["state_dict"], FEEDS))
    with pytest.raises(automatch.MappingError, match="has 2 parameter groups, the new one has 1") as error:
        fit(pl, refactored, 6, tmp_path, [match], path)
    assert "SaveSnapshot" in error.value.__notes__[0]
    assert_unchanged(refactored, before)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_ended_early_leaves_nothing_for_the_next(pl, mixed, tmp_path):
    path = trained(pl, modules(pl, "adam", 2)[0], tmp_path)
    v2 = modules(pl, "adam", 1, *((automatch.lightning.AutoMatchMixin,) if mixed else ()))[1]
    mapping = mapping_of(v2(), torch.load(path, weights_only=False)["state_dict"], FEEDS)
    v2.automatch_options = {"mapping": mapping}
    model = v2()

    class Failing(pl.Callback):
        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            raise RuntimeError("another callback failed")

    callbacks = [] if mixed else [automatch.lightning.AutoMatch(mapping=mapping)]
    with pytest.raises(RuntimeError, match="another callback failed"):
        fit(pl, model, 6, tmp_path, [*callbacks, Failing()], path)
    fit(pl, model, 1, tmp_path, callbacks)  # the two groups of the checkpoint are nothing to this run
    assert len(model.losses) == 6

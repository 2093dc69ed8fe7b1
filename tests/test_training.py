from __future__ import annotations

import pytest
import torch
from handmade import mapping_of
from torch import nn

from automatch.specs import spec_of_model
from automatch.training import complete_state, remap_copies
from automatch.transforms import Concat


class New(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.qk = nn.Linear(2, 4, bias=False)


FEEDS = {
    "head.weight": "out.w",
    "head.bias": "out.b",
    "norm.weight": "n.w",
    "norm.bias": "n.b",
    "norm.running_mean": "n.m",
    "norm.running_var": "n.v",
    "qk.weight": (("q", "k"), Concat(0)),
}
PARAMETERS = ("q", "k", "n.w", "n.b", "out.w", "out.b")


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (2, 2), "k": (2, 2), "n.w": (2,), "n.b": (2,), "n.m": (2,), "n.v": (2,), "out.w": (2, 2), "out.b": (2,)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def model() -> New:
    return New()


@pytest.fixture
def mapping(model):
    return mapping_of(model, weights(0), FEEDS)


def test_copies_follow_wherever_they_are(model, mapping):
    copies = [weights(seed) for seed in range(1, 5)]
    averaged = {f"module.{key}": value for key, value in copies[0].items()} | {"n_averaged": torch.tensor(3)}
    tree = {
        "callbacks": {"SWA": {"average_model_state": averaged, "epoch": 3, "none": None}},
        "ema": {"decay": 0.9, "shadow": {key: copies[1][key] for key in PARAMETERS}},
        "torch_ema": {"shadow_params": [copies[2][key] for key in PARAMETERS], "num_updates": 7},
        "history": [copies[3], {"loss": [1.0, 2.0]}],
        "untouched": {"q": torch.zeros(2, 2)},
        "optimizer_states": [copies[0]],
    }
    moved = remap_copies(tree, mapping, model)
    swa = moved["callbacks"]["SWA"]["average_model_state"]
    assert torch.equal(swa["module.qk.weight"], torch.cat([copies[0]["q"], copies[0]["k"]]))
    assert set(swa) == {f"module.{key}" for key in model.state_dict()} | {"n_averaged"}
    assert set(moved["ema"]["shadow"]) == set(dict(model.named_parameters()))
    assert torch.equal(moved["ema"]["shadow"]["head.bias"], copies[1]["out.b"])
    assert moved["ema"]["decay"] == 0.9
    listed = dict(zip(dict(model.named_parameters()), moved["torch_ema"]["shadow_params"], strict=True))
    assert torch.equal(listed["norm.bias"], copies[2]["n.b"])
    assert torch.equal(listed["qk.weight"], torch.cat([copies[2]["q"], copies[2]["k"]]))
    assert torch.equal(moved["history"][0]["head.weight"], copies[3]["out.w"])
    assert moved["history"][1] == {"loss": [1.0, 2.0]}
    assert moved["untouched"] is tree["untouched"]
    assert moved["optimizer_states"] is tree["optimizer_states"]
    assert set(averaged) == {f"module.{key}" for key in weights(0)} | {"n_averaged"}  # the tree given is not changed


def test_lists_that_are_no_copies_stay(model, mapping):
    tree = {"losses": [torch.tensor(1.0), torch.tensor(2.0)], "params": [torch.zeros(9)] * len(PARAMETERS)}
    moved = remap_copies(tree, mapping, model)
    assert moved == tree


def test_a_state_is_completed_with_tied_keys_and_own_values(model):
    model.other = nn.Linear(2, 2)
    model.other.weight = model.head.weight
    given = {"head.weight": torch.ones(2, 2)}
    whole = complete_state(given, spec_of_model(model), model.state_dict())
    assert set(whole) == set(model.state_dict())
    assert torch.equal(whole["other.weight"], torch.ones(2, 2))
    assert torch.equal(whole["other.bias"], model.other.bias)

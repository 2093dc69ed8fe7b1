from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from handmade import mapping_of
from torch import nn

from automatch.errors import CheckpointError, MappingError
from automatch.mapping import KeyMapping, Side
from automatch.specs import spec_of_state_dict
from automatch.transforms import Concat, Copy, Permute, Slice, chain


@pytest.fixture
def ckpt() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"q": torch.randn(2, 3), "k": torch.randn(2, 3), "v": torch.randn(2, 3), "norm": torch.randn(3), "up": torch.randn(4, 3)}


def skeleton(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_renames_are_views_of_the_checkpoint(ckpt):
    mapping = mapping_of(skeleton(n=(3,), a=(2, 3)), ckpt, {"a": ("up", Slice(0, 2, 2)), "n": "norm"})
    applied = mapping.apply(ckpt)
    assert list(applied) == ["n", "a"]  # the model's order
    assert applied["n"].data_ptr() == ckpt["norm"].data_ptr()
    assert applied["a"].data_ptr() == ckpt["up"][2:].data_ptr()


def test_joined_and_permuted_tensors(ckpt):
    mapping = mapping_of(
        skeleton(qkv=(6, 3), up=(3, 4), down=(3, 6)),
        ckpt,
        {
            "qkv": (("q", "k", "v"), Concat(0)),
            "up": ("up", Permute((1, 0))),
            "down": (("v", "k", "q"), chain(Concat(0), Permute((1, 0)))),
        },
    )
    applied = mapping.apply(ckpt)
    assert torch.equal(applied["qkv"], torch.cat([ckpt["q"], ckpt["k"], ckpt["v"]]))
    assert torch.equal(applied["up"], ckpt["up"].T)
    assert torch.equal(applied["down"], torch.cat([ckpt["v"], ckpt["k"], ckpt["q"]]).T)


def test_each_source_is_read_when_it_is_needed_and_once(ckpt):
    class Counting:
        spec = spec_of_state_dict(ckpt)
        reads: ClassVar[list[str]] = []

        def tensor(self, key):
            self.reads.append(key)
            return ckpt[key]

    mapping = mapping_of(skeleton(a=(2, 3), b=(2, 3)), ckpt, {"a": ("up", Slice(0, 0, 2)), "b": ("up", Slice(0, 2, 2))})
    mapping.apply(Counting())
    assert Counting.reads == ["up"]


def test_numpy_values_become_tensors_and_must_keep_their_promise(ckpt):
    class Arrays:
        spec = spec_of_state_dict(ckpt)
        values: ClassVar = {key: value.numpy() for key, value in ckpt.items()}

        def tensor(self, key):
            return self.values[key]

    mapping = mapping_of(skeleton(n=(3,)), ckpt, {"n": "norm"})
    assert torch.equal(mapping.apply(Arrays())["n"], ckpt["norm"])
    Arrays.values["norm"] = Arrays.values["norm"][:2]
    with pytest.raises(CheckpointError, match=r"'norm'.* has shape \(2,\), its header says \(3,\)"):
        mapping.apply(Arrays())


def test_a_lightning_checkpoint_is_opened_where_the_mapping_was_made(ckpt, tmp_path):
    whole = {"state_dict": ckpt, "epoch": 3}
    mapping = mapping_of(skeleton(n=(3,)), whole, {"n": "norm"})
    torch.save(whole, tmp_path / "last.ckpt")
    for given in (whole, ckpt, tmp_path / "last.ckpt", str(tmp_path / "last.ckpt")):
        assert torch.equal(mapping.apply(given)["n"], ckpt["norm"])


def test_another_checkpoint_is_refused(ckpt):
    mapping = mapping_of(skeleton(n=(3,)), ckpt, {"n": "norm"})
    renamed = {("norm2" if key == "norm" else key): value for key, value in ckpt.items()}
    with pytest.raises(MappingError, match=r"made for another checkpoint.*'norm' is not there.*propose_mapping"):
        mapping.apply(renamed)
    with pytest.raises(MappingError, match=r"'norm' has shape \(4,\), not \(3,\)"):
        mapping.apply(ckpt | {"norm": torch.zeros(4)})
    with pytest.raises(MappingError, match="'extra' is new"):
        mapping.apply(ckpt | {"extra": torch.zeros(4)})
    with pytest.raises(MappingError, match="'norm' is int64, not float32"):
        mapping.apply(ckpt | {"norm": torch.zeros(3, dtype=torch.int64)})


def test_half_precision_and_sorted_copies_of_the_checkpoint_are_the_same_checkpoint(ckpt):
    mapping = mapping_of(skeleton(n=(3,)), ckpt, {"n": "norm"})
    assert mapping.apply({key: value.half() for key, value in ckpt.items()})["n"].dtype is torch.float16
    assert torch.equal(mapping.apply(dict(sorted(ckpt.items())))["n"], ckpt["norm"])


def test_a_mapping_without_specs_or_with_a_forged_fingerprint_is_held_to_its_fingerprint(ckpt):
    mapping = mapping_of(skeleton(n=(3,)), ckpt, {"n": "norm"})
    bare = replace(mapping, source=replace(mapping.source, spec=None), target=replace(mapping.target, spec=None))
    assert list(bare.apply(ckpt)) == ["n"]
    for side in (replace(bare.source, fingerprint="sha256:" + "0" * 64), replace(mapping.source, fingerprint="sha256:" + "0" * 64)):
        with pytest.raises(MappingError, match="made for another checkpoint"):
            replace(mapping, source=side).apply(ckpt)


def test_a_match_that_does_not_fit_is_named(ckpt):
    with pytest.raises(MappingError, match=r"size mismatch for 'n'.*'q'.*gives \(2, 3\), the model wants \(3,\)"):
        mapping_of(skeleton(n=(3,)), ckpt, {"n": "q"}).apply(ckpt)
    with pytest.raises(MappingError, match=r"'n' cannot be made from 'q', 'up'"):
        mapping_of(skeleton(n=(3,)), ckpt, {"n": (("q", "up"), Concat(1))}).apply(ckpt)
    handmade = KeyMapping(Side.of(spec_of_state_dict(ckpt)), Side.of(spec_of_state_dict(skeleton(n=(3,)))), ())
    strange = replace(handmade, matches=(replace(mapping_of(skeleton(n=(3,)), ckpt, {"n": "norm"})["n"], sources=("gone",)),))
    with pytest.raises(MappingError, match=r"feeds 'n' from 'gone', which is not a key"):
        strange.apply(ckpt)


def test_a_spec_has_no_values(ckpt):
    mapping = mapping_of(skeleton(n=(3,)), ckpt, {"n": ("norm", Copy())})
    with pytest.raises(MappingError, match="holds no values"):
        mapping.apply(spec_of_state_dict(ckpt))


def test_applied_state_loads_with_plain_pytorch(ckpt):
    model = nn.Linear(3, 4, bias=False)
    model.load_state_dict(mapping_of(model, ckpt, {"weight": "up"}).apply(ckpt))
    assert torch.equal(model.weight, ckpt["up"])

from __future__ import annotations

import pytest
import torch
from handmade import assert_unchanged, mapping_of, snapshot_of
from torch import nn

import automatch
from automatch.adapt import apply_adapted, explain_mismatch
from automatch.errors import AutomatchError, LoadError, MappingError, TransformError
from automatch.resize import METHODS, grid_of
from automatch.transforms import Adapt, Permute, chain


def adapted(method: str, tensor: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    return apply_adapted(Adapt(method, tuple(initial.shape)), [tensor], initial)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rows_keeps_what_both_have():
    old, initial = torch.randn(5, 3), torch.randn(7, 3)
    grown = adapted("rows", old, initial)
    assert torch.equal(grown, torch.cat([old, initial[5:]]))
    assert torch.equal(adapted("rows", old, initial[:2]), old[:2])
    assert torch.equal(adapted("rows", old[:, 0], initial[:, 0])[:5], old[:, 0])


def test_overlap_keeps_the_corner():
    old, initial = torch.randn(2, 5), torch.randn(4, 3)
    result = adapted("overlap", old, initial)
    assert torch.equal(result[:2], old[:, :3])
    assert torch.equal(result[2:], initial[2:])


@pytest.mark.parametrize("shape", [(1, 17), (1, 16), (17,), (1, 18)])
@pytest.mark.parametrize("side", [3, 6])
def test_position_grids_are_interpolated_and_class_tokens_kept(shape, side):
    # every channel is a plane over the grid; interpolating one gives the plane again, except where edges are clamped
    extra, old_side = grid_of(shape[-1])
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, old_side), torch.linspace(-1, 1, old_side), indexing="ij")
    grid = torch.stack([rows.flatten(), columns.flatten()], -1)
    old = torch.cat([torch.full((extra, 2), 9.0), grid]).reshape(*shape, 2)
    initial = torch.zeros(*shape[:-1], extra + side * side, 2)
    result = adapted("interpolate", old, initial)
    flat = result.reshape(-1, 2)
    assert torch.equal(flat[:extra], torch.full((extra, 2), 9.0))
    new = flat[extra:].reshape(side, side, 2)
    assert torch.allclose(new[..., 0], new[..., 1].T, atol=1e-6)
    assert (new[1:, :, 0] > new[:-1, :, 0]).all()
    assert new.mean().abs() < 1e-6


def test_position_grids_like_timm():
    # timm's resample_abs_pos_embed: bicubic, antialias, class token in front
    old = torch.randn(1, 1 + 16, 8)
    result = adapted("interpolate", old, torch.zeros(1, 1 + 36, 8))
    grid = old[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 36, 8)
    assert torch.equal(result, torch.cat([old[:, :1], expected], 1))


@pytest.mark.parametrize(
    ("method", "old_grid", "new_grid"),
    [("interpolate:4x4->3x6", (4, 4), (3, 6)), ("interpolate:3x6", (4, 4), (3, 6)), ("interpolate:2x8->5x5", (2, 8), (5, 5))],
)
def test_position_grids_need_not_be_square(method, old_grid, new_grid):
    old = torch.randn(1, 1 + 16, 8)
    result = adapted(method, old, torch.zeros(1, 1 + new_grid[0] * new_grid[1], 8))
    grid = old[:, 1:].reshape(1, *old_grid, 8).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=new_grid, mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, -1, 8)
    assert torch.equal(result, torch.cat([old[:, :1], expected], 1))
    with pytest.raises(TransformError, match=r"name others as interpolate:HxW->HxW"):
        adapted("interpolate:5x7", old, torch.zeros(1, 1 + new_grid[0] * new_grid[1], 8))


def test_a_grid_that_is_named_is_loaded():
    old, model = nn.Module(), nn.Module()
    old.pos_embed, model.pos_embed = nn.Parameter(torch.randn(1, 17, 8)), nn.Parameter(torch.zeros(1, 19, 8))
    report = automatch.load(model, old.state_dict(), adapt={"pos_embed": "interpolate:3x6"})
    assert report.to_train_keys == ("pos_embed",)
    assert torch.equal(model.pos_embed[:, 0], old.pos_embed[:, 0])
    assert report.adapted["pos_embed"].startswith("interpolate:3x6: another patch grid")


def test_position_grids_like_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, patch_size=4
    )
    embeddings = transformers.ViTModel(config).embeddings
    nn.init.normal_(embeddings.position_embeddings)
    with torch.no_grad():
        expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + 12 * 12, 8), 48, 48)
    result = adapted("interpolate_plain", embeddings.position_embeddings.detach(), torch.zeros(1, 145, 8))
    assert torch.allclose(result, expected, atol=1e-6)


def test_a_class_token_that_the_checkpoint_lacks_is_the_models():
    initial = torch.randn(1, 1 + 9, 4)
    result = adapted("interpolate", torch.randn(1, 16, 4), initial)
    assert torch.equal(result[:, 0], initial[:, 0])


def test_sequences_are_interpolated_with_their_ends_kept():
    old = torch.linspace(0, 1, 5)[:, None].repeat(1, 3)
    result = adapted("interpolate_1d", old, torch.zeros(9, 3))
    assert torch.allclose(result[:, 0], torch.linspace(0, 1, 9))


@pytest.mark.parametrize("extra", [0, 3])
def test_relative_position_tables(extra):
    old = torch.randn(7 * 7 + extra, 4)
    result = adapted("relative_position", old, torch.zeros(13 * 13 + extra, 4))
    assert torch.equal(result[13 * 13 :], old[49:])
    center = result[: 13 * 13].reshape(13, 13, 4)[6, 6]
    assert torch.allclose(center, old[:49].reshape(7, 7, 4)[3, 3], atol=0.2)


def test_kernels():
    three, one = torch.randn(4, 2, 3, 3), torch.zeros(4, 2, 1, 1)
    assert torch.equal(adapted("center", three, one), three[:, :, 1:2, 1:2])
    padded = adapted("center", three, torch.ones(4, 2, 5, 5))
    assert torch.equal(padded[:, :, 1:4, 1:4], three)
    assert padded.sum() == pytest.approx(three.sum().item(), abs=1e-5)
    assert torch.allclose(adapted("average", three, one)[..., 0, 0], three.sum((2, 3)))
    spread = adapted("average", adapted("average", three, one), three)
    assert torch.allclose(spread.sum((2, 3)), three.sum((2, 3)), atol=1e-6)
    flat = torch.ones(4, 2, 4, 4)
    assert torch.allclose(adapted("resize_kernel", flat, torch.zeros(4, 2, 8, 8)).sum((2, 3)), flat.sum((2, 3)), atol=1e-5)


def test_input_channels_give_the_same_result_for_a_grey_image():
    rgb = nn.Conv2d(3, 4, 3, bias=False)
    grey = torch.randn(1, 1, 6, 6)
    to_grey = adapted("channels", rgb.weight.detach(), torch.zeros(4, 1, 3, 3))
    assert torch.allclose(nn.functional.conv2d(grey, to_grey), rgb(grey.expand(-1, 3, -1, -1)), atol=1e-5)
    back = adapted("channels", to_grey, torch.zeros(4, 3, 3, 3))
    assert torch.allclose(nn.functional.conv2d(grey.expand(-1, 3, -1, -1), back), nn.functional.conv2d(grey, to_grey), atol=1e-5)


def test_more_channels_are_repeated_and_scaled_as_timm_does():
    rgb = torch.randn(4, 3, 2, 2)
    result = adapted("channels", rgb, torch.zeros(4, 4, 2, 2))
    assert torch.allclose(result, torch.cat([rgb, rgb[:, :1]], 1) * 3 / 4)
    assert torch.allclose(adapted("channels", torch.cat([rgb, rgb], 1), torch.zeros(4, 3, 2, 2)), 2 * rgb)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 4, 4, 3)])
def test_position_maps_are_interpolated_with_channels_first_or_last(shape):
    last = shape[-1] == 3
    old = torch.randn(shape)
    result = adapted("interpolate", old, torch.zeros((1, 6, 6, 3) if last else (1, 3, 6, 6)))
    first = old.permute(0, 3, 1, 2) if last else old
    expected = nn.functional.interpolate(first, size=(6, 6), mode="bicubic", antialias=True)
    assert torch.equal(result, expected.permute(0, 2, 3, 1) if last else expected)


def test_inflated_kernels_give_the_same_result_for_a_still_film():
    flat = torch.randn(4, 2, 3, 3)
    deep = adapted("inflate", flat, torch.zeros(4, 2, 5, 3, 3))
    image = torch.randn(1, 2, 6, 6)
    film = image[:, :, None].expand(-1, -1, 5, -1, -1)
    assert torch.allclose(nn.functional.conv3d(film, deep)[:, :, 0], nn.functional.conv2d(image, flat), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "source", "target"),
    [
        ("rows", (3, 4), (3, 5)),
        ("overlap", (3,), (3, 1)),
        ("interpolate", (1, 15, 4), (1, 16, 4)),
        ("relative_position", (50, 2), (49, 2)),
        ("center", (4, 2, 3), (4, 3, 3)),
        ("average", (4, 2, 3, 3), (4, 2, 5, 5)),
        ("channels", (4, 3, 3, 3), (4, 2, 3, 3)),
        ("channels", (4, 3, 3, 3), (5, 3, 3, 3)),
        ("inflate", (4, 2, 3, 3), (4, 3, 5, 3, 3)),
    ],
)
def test_methods_refuse_other_shapes_and_say_what_they_need(method, source, target):
    with pytest.raises(TransformError, match=rf"'{method}' cannot turn .* into .*: {METHODS[method].needs[:10]}"):
        adapted(method, torch.zeros(source), torch.zeros(target))


def test_a_transform_may_come_before_the_adaptation():
    old = torch.randn(3, 5)
    result = apply_adapted(chain(Permute((1, 0)), Adapt("rows", (2, 3))), [old], torch.zeros(2, 3))
    assert torch.equal(result, old.T[:2])


class Classifier(nn.Module):
    def __init__(self, classes: int, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, kernel)
        self.head = nn.Linear(4, classes)


def renamed(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"net.{key}": value for key, value in model.state_dict().items()}


FEEDS = {"stem.weight": "net.stem.weight", "stem.bias": "net.stem.bias"}


def test_a_resized_head_is_refused_until_it_is_asked_for():
    ckpt, model = renamed(Classifier(10)), Classifier(4)
    mapping = mapping_of(model, ckpt, FEEDS)
    before = snapshot_of(model)
    with pytest.raises(LoadError, match=r"another number of classes.*\(10, 4\), model \(4, 4\).*adapt="):
        automatch.load(model, ckpt, mapping=mapping)
    assert_unchanged(model, before)
    report = automatch.load(model, ckpt, mapping=mapping, strict=False)
    assert any(
        text.startswith("size mismatch for 'head.weight' with 'net.head.weight': another number of classes") for text in report.warnings
    )
    report = automatch.load(model, ckpt, mapping=mapping, adapt={"head.*": "rows"})
    assert torch.equal(model.head.weight, ckpt["net.head.weight"][:4])
    assert report.adapted["head.weight"].startswith("rows: another number of classes")
    assert report.to_train_keys == ("head.weight", "head.bias")
    assert report.missing_keys == report.unexpected_keys == ()
    torch.optim.SGD([{"params": report.to_train}], lr=0.1)


class Net(nn.Module):
    """Everything below one prefix, so that a renamed prefix renames it all."""

    def __init__(self, prefix: str, classes: int, vocabulary: int, channels: int, tokens: int) -> None:
        super().__init__()
        inner = nn.ModuleDict({"stem": nn.Conv2d(channels, 4, 3), "fc": nn.Linear(4, 4), "head": nn.Linear(4, classes)})
        inner["tok_embed"] = nn.Embedding(vocabulary, 4)
        inner.pos_embed = nn.Parameter(torch.randn(1, tokens, 4))
        setattr(self, prefix, inner)


def test_every_size_mismatch_is_found_under_a_renamed_prefix():
    ckpt, model = Net("net", 10, 50, 3, 17).state_dict(), Net("model", 4, 60, 1, 37)
    mapping = mapping_of(model, ckpt, {f"model.fc.{leaf}": f"net.fc.{leaf}" for leaf in ("weight", "bias")})
    report = automatch.load(model, ckpt, mapping=mapping, strict=False)
    whys = {
        "pos_embed": "another patch grid or sequence length",
        "stem.weight": "another number of input channels",
        "head.weight": "another number of classes",
        "head.bias": "another number of classes",
        "tok_embed.weight": "another vocabulary",
    }
    assert {key.removeprefix("model.") for key in report.size_mismatches} == set(whys)  # net.stem.bias fits and is no mismatch
    for key, why in whys.items():
        text = report.size_mismatches[f"model.{key}"]
        assert text.startswith(f"size mismatch for 'model.{key}' with 'net.{key}': {why}")
        assert text in report.warnings
    adapt = {"*.stem.weight": "channels", "*.head.*": "rows", "*.tok_embed.weight": "rows", "*.pos_embed": "interpolate"}
    report = automatch.load(model, ckpt, mapping=mapping, adapt=adapt, pins={"model.stem.bias": "net.stem.bias"})
    assert set(report.to_train_keys) == set(report.adapted) == {f"model.{key}" for key in whys}
    assert torch.equal(model.model["head"].weight, ckpt["net.head.weight"][:4])
    assert torch.equal(model.model["tok_embed"].weight[:50], ckpt["net.tok_embed.weight"])


def test_the_bias_of_an_adapted_kernel_is_copied():
    ckpt, model = Net("net", 4, 60, 3, 37).state_dict(), Net("model", 4, 60, 1, 37)
    feeds = {key: key.replace("model.", "net.") for key in model.state_dict() if ".stem." not in key}
    mapping = mapping_of(model, ckpt, feeds)
    with pytest.raises(LoadError, match=r"'model.stem.bias': nothing sure feeds it; by its name it is 'net.stem.bias', of the same shape"):
        automatch.load(model, ckpt, mapping=mapping)
    report = automatch.load(model, ckpt, mapping=mapping, adapt={"model.stem.*": "channels"})
    assert torch.equal(model.model["stem"].bias, ckpt["net.stem.bias"])
    assert list(report.adapted) == list(report.to_train_keys) == ["model.stem.weight"]


def test_many_size_mismatches_are_all_in_the_report():
    ckpt, model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(30)]).state_dict(), nn.Sequential(*[nn.Linear(2, 3) for _ in range(30)])
    report = automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, {}), strict=False)
    assert len(report.size_mismatches) == 60
    assert "40 more size mismatches: report.size_mismatches" in report.warnings


def test_tied_keys_are_adapted_under_either_name():
    class Tied(nn.Module):
        def __init__(self, words: int) -> None:
            super().__init__()
            self.wte, self.lm_head = nn.Embedding(words, 4), nn.Linear(4, words, bias=False)
            self.lm_head.weight = self.wte.weight

    ckpt = Tied(10).state_dict()
    for pattern, pins in (("wte.*", {}), ("lm_head.*", {}), ("*", {}), ("lm_head.*", {"lm_head.weight": "lm_head.weight"})):
        model = Tied(12)
        report = automatch.load(model, ckpt, adapt={pattern: "rows"}, pins=pins)
        assert report.to_train_keys == ("wte.weight",)
        assert report.missing_keys == ()
        assert torch.equal(model.lm_head.weight[:10], ckpt["wte.weight"])


def test_keeping_initial_values_on_purpose():
    ckpt, model = renamed(Classifier(10)), Classifier(4)
    before = model.head.weight.detach().clone()
    report = automatch.load(model, ckpt, mapping=mapping_of(model, ckpt, FEEDS), adapt={"head.*": "keep"})
    assert torch.equal(model.head.weight, before)
    assert report.to_train_keys == report.missing_keys == ("head.weight", "head.bias")
    assert report.adapted == {}
    assert any("'head.weight', 'head.bias'" in text for text in report.warnings)


def test_pins_say_which_source_is_adapted():
    ckpt = renamed(Classifier(10)) | {"aux.weight": torch.ones(6, 4), "aux.bias": torch.ones(6)}
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "fc": nn.Linear(4, 5)})
    mapping = mapping_of(model, ckpt, FEEDS)
    with pytest.raises(MappingError, match=r"2 checkpoint keys may feed 'fc.weight': 'net.head.weight', 'aux.weight'; choose"):
        automatch.load(model, ckpt, mapping=mapping, adapt={"fc.*": "rows"})
    automatch.load(model, ckpt, mapping=mapping, adapt={"fc.*": "rows"}, pins={"fc.weight": "aux.weight", "fc.bias": "aux.bias"})
    assert torch.equal(model["fc"].weight, torch.ones(5, 4))


def test_only_named_keys_are_adapted_and_exact_matches_stay():
    ckpt, model = renamed(Classifier(4, kernel=5)), Classifier(4)
    mapping = mapping_of(model, ckpt, {"stem.bias": "net.stem.bias", "head.weight": "net.head.weight", "head.bias": "net.head.bias"})
    report = automatch.load(model, ckpt, mapping=mapping, adapt={"*": "center"})
    assert list(report.adapted) == ["stem.weight"]
    assert torch.equal(model.stem.weight, ckpt["net.stem.weight"][:, :, 1:4, 1:4])
    assert torch.equal(model.head.weight, ckpt["net.head.weight"])


def test_mistakes_in_adapt_are_named():
    ckpt, model = renamed(Classifier(10)), Classifier(4)
    mapping = mapping_of(model, ckpt, FEEDS)
    with pytest.raises(MappingError, match=r"unknown method 'stretch' for 'head.*'.*keep, rows"):
        automatch.load(model, ckpt, mapping=mapping, adapt={"head.*": "stretch"})
    with pytest.raises(MappingError, match=r"no key of the model is like 'haed.\*'"):
        automatch.load(model, ckpt, mapping=mapping, adapt={"haed.*": "rows"})
    with pytest.raises(MappingError, match=r"nothing in the checkpoint can feed 'head.weight' \(4, 4\) with 'center'"):
        automatch.load(model, ckpt, mapping=mapping, adapt={"head.*": "center"})
    with pytest.raises(AutomatchError, match=r"the model is on the meta device and has no initial values"):
        automatch.load(model.to("meta"), ckpt, mapping=mapping, adapt={"head.*": "rows"})


@pytest.mark.parametrize(
    ("key", "source", "target", "why"),
    [
        ("fc.weight", (1000, 512), (10, 512), "another number of classes"),
        ("embed_tokens.weight", (32000, 64), (32016, 64), "another vocabulary"),
        ("conv.weight", (8, 4, 3, 3), (8, 4, 1, 1), "another kernel"),
        ("conv1.weight", (64, 3, 7, 7), (64, 1, 7, 7), "another number of input channels"),
        ("pos_embed", (1, 197, 8), (1, 257, 8), "another patch grid"),
        ("blocks.0.attn.relative_position_bias_table", (169, 4), (529, 4), "another window size"),
        ("conv.weight", (8, 4, 3, 3), (8, 4, 3, 3, 3), "a 2-D kernel in a 3-D model"),
        ("mlp.weight", (8, 4), (16, 8), "another width"),
        ("conv.weight", (8, 3, 5), (8, 1, 5), "another number of input channels"),
        ("decomposition.weight", (9, 4), (7, 4), "another number of classes, or another width"),
        ("encoder.embed_positions.weight", (512, 4), (1024, 4), "another patch grid or sequence length"),
        ("transformer.wpe.weight", (512, 4), (1024, 4), "another patch grid or sequence length"),
        ("position_embedding.weight", (512, 4), (1024, 4), "another patch grid or sequence length"),
        ("x", (8,), (8, 1, 1), "another layout"),
    ],
)
def test_size_mismatches_are_explained(key, source, target, why):
    text = explain_mismatch(key, source, target)
    assert text.startswith(why)
    assert str(source) in text
    assert str(target) in text
    offered = text.partition("adapt: ")[2].split(" or ")
    assert offered[-1] == "keep"
    assert all(METHODS[method].fits(source, target) for method in offered[:-1])

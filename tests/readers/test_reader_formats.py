"""Files of other libraries, written by those libraries: see make_files.py for those in data/."""

from __future__ import annotations

import builtins
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, safe_open, save_file

from automatch import CheckpointError, MissingExtraError, UnsafeCheckpointError, open_checkpoint
from automatch.cli import main
from automatch.specs import StateSpec, TensorSpec

DATA = Path(__file__).with_name("data")


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def check_counted(checkpoint, keys):
    assert set(checkpoint.spec.keys) == set(keys)
    for key, shape in keys.items():
        assert checkpoint.spec[key].shape == shape
        assert torch.equal(checkpoint.tensor(key), counted(*shape)), key


# ---- safetensors --------------------------------------------------------------------------------


def test_safetensors_agrees_with_its_own_library(tmp_path):
    names = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64 float8_e4m3fn float8_e5m2"
    state = {f"z.{name}": torch.tensor([[0.0, 1, 1], [1, 0, 1]]).to(getattr(torch, name)) for name in names.split()}
    state |= {"a.scalar": torch.tensor(3.0), "a.empty": torch.empty(0, 4)}
    save_file(state, tmp_path / "m.safetensors", metadata={"format": "pt", "author": "me"})
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint, safe_open(tmp_path / "m.safetensors", "pt") as theirs:
        assert checkpoint.spec.keys == tuple(json.loads((tmp_path / "m.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"))[1:]
        assert checkpoint.metadata == theirs.metadata()
        for key in theirs.keys():  # noqa: SIM118
            mine, expected = checkpoint.tensor(key), theirs.get_tensor(key)
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape)
            assert torch.equal(mine.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_wrapper_of_a_flat_file_is_an_error(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"is flat: it holds no tensors at 'model'; leave wrapper out"):
        open_checkpoint(tmp_path / "m.safetensors", wrapper=("model",))


# ---- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {
        "layer.w": np.arange(6.0).reshape(2, 3),
        "turned": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
    }
    arrays |= {"scalar": np.float32(2), "flag": np.array([True, False]), "empty": np.zeros((0, 2), np.float16), "z": np.array([1 + 2j])}
    save(tmp_path / "m.npz", **arrays)
    with open_checkpoint(tmp_path / "m.npz") as checkpoint:
        assert checkpoint.spec.keys == tuple(arrays)
        for key, array in arrays.items():
            assert checkpoint.spec[key].shape == array.shape
            assert np.array_equal(checkpoint.tensor(key).numpy(), array)


def test_npz_whose_header_is_cut_within_a_bracket(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3, np.float32))
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as archive:
        archive.writestr("w.npy", buffer.getvalue().replace(b"'shape': (3,), }", b"'shape': (3,  {x"))
    with pytest.raises(CheckpointError, match=r"the header of 'w\.npy' in .* is damaged"):
        open_checkpoint(tmp_path / "m.npz")


def test_npz_with_objects_or_foreign_dtypes_is_refused(tmp_path):
    np.savez(tmp_path / "o.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UnsafeCheckpointError, match=r"'a\.npy' in .*o\.npz holds pickled objects"):
        open_checkpoint(tmp_path / "o.npz")
    np.savez(tmp_path / "s.npz", a=np.array(["text"]))
    with pytest.raises(CheckpointError, match=r"dtype '<U4', which torch has not"):
        open_checkpoint(tmp_path / "s.npz")


# ---- Flax, Keras, GGUF ---------------------------------------------------------------------------

KERAS = {"conv2d.vars.0": (3, 3, 3, 4), "conv2d.vars.1": (4,), "dense.vars.0": (144, 2), "dense.vars.1": (2,)}
KERAS |= {f"batch_normalization.vars.{i}": (4,) for i in range(4)}


def test_flax():
    with open_checkpoint(DATA / "flax.msgpack") as checkpoint:
        layers = {"Conv_0.kernel": (3, 3, 3, 4), "Conv_0.bias": (4,), "BatchNorm_0.scale": (4,), "BatchNorm_0.bias": (4,)}
        layers |= {"Dense_0.kernel": (4, 2), "Dense_0.bias": (2,)}
        statistics = {"batch_stats.BatchNorm_0.mean": (4,), "batch_stats.BatchNorm_0.var": (4,)}
        check_counted(checkpoint, statistics | {f"params.{key}": shape for key, shape in layers.items()})


def test_flax_arrays_in_several_pieces_and_in_bfloat16():
    with open_checkpoint(DATA / "flax_chunked.msgpack") as checkpoint:
        assert checkpoint.spec.keys == ("big", "half")
        assert torch.equal(checkpoint.tensor("big"), counted(6, 7))
        assert torch.equal(checkpoint.tensor("half"), torch.ones(3, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", ["keras.weights.h5", "model.keras"])
def test_keras_weights_without_the_optimizer(name):
    pytest.importorskip("h5py")
    with open_checkpoint(DATA / name) as checkpoint:
        check_counted(checkpoint, KERAS)
    like = StateSpec(tuple(TensorSpec(key, shape, "float32") for key, shape in KERAS.items()))
    with open_checkpoint(DATA / name, like=like) as checkpoint:  # the same weights, under the same keys
        check_counted(checkpoint, KERAS)
        assert checkpoint.spec.notes == ()


def test_gguf_agrees_with_its_own_library():
    gguf = pytest.importorskip("gguf")
    theirs = gguf.GGUFReader(DATA / "small.gguf")
    with open_checkpoint(DATA / "small.gguf") as checkpoint:
        assert checkpoint.spec.keys == tuple(tensor.name for tensor in theirs.tensors)
        for tensor in theirs.tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert checkpoint.spec[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
            assert np.array_equal(checkpoint.tensor(tensor.name).float().numpy(), expected)
        assert any("1 tensors are quantised (1 Q8_0)" in note for note in checkpoint.spec.notes)


@pytest.mark.parametrize(("name", "package", "extra"), [("small.gguf", "gguf", "gguf"), ("model.keras", "h5py", "keras")])
def test_a_missing_extra_names_the_install_command(name, package, extra, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf'pip install "automatch\[{extra}\]"'):
        open_checkpoint(DATA / name)


# ---- what cannot be read --------------------------------------------------------------------------


def test_tensorflow_and_orbax_are_named_with_the_way_out(tmp_path):
    (tmp_path / "model.ckpt.index").write_bytes(b"\0" * 60)
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(b"\0" * 60)
    for path in (tmp_path / "model.ckpt", tmp_path / "model.ckpt.index", tmp_path / "model.ckpt.data-00000-of-00001", tmp_path):
        with pytest.raises(CheckpointError, match=r"TensorFlow checkpoint, which only TensorFlow reads.*numpy\.savez"):
            open_checkpoint(path)
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Orbax checkpoint; restore it and save flax"):
        open_checkpoint(tmp_path / "orbax")


# ---- quantised -----------------------------------------------------------------------------------


def packed(kind: str) -> dict[str, torch.Tensor]:
    whole = {"embed.weight": torch.zeros(4, 8)}
    layer = {
        "GPTQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        "AWQ": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "bitsandbytes 4-bit": {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_map": torch.float32},
        "bitsandbytes 8-bit": {"weight": torch.int8, "SCB": torch.float32},
        "8-bit floats with scales": {"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32},
        "integers with scales": {"weight": torch.int8, "weight_scale": torch.float32},
        "4-bit blocks with scales": {"experts_blocks": torch.uint8, "experts_scales": torch.uint8},
    }[kind]
    return whole | {f"layers.0.q.{leaf}": torch.zeros(4, 4).to(dtype) for leaf, dtype in layer.items()}


KINDS = [
    "GPTQ", "AWQ", "bitsandbytes 4-bit", "bitsandbytes 8-bit", "8-bit floats with scales", "integers with scales",
    "4-bit blocks with scales",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_recognised(tmp_path, kind):
    save_file(packed(kind), tmp_path / "m.safetensors")
    for source in (tmp_path / "m.safetensors", packed(kind)):
        (note,) = open_checkpoint(source).spec.notes
        assert f"1 by {kind} (e.g. 'layers.0.q." in note


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_says_that_weights_are_packed(tmp_path, kind):
    save_file(packed(kind), tmp_path / "m.safetensors")
    save_file({"embed.weight": torch.zeros(4, 8), "blocks.0.q.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    result = CliRunner().invoke(main, ["propose", str(tmp_path / "m.safetensors"), "-m", str(tmp_path / "model.safetensors")])
    assert result.exit_code == 1
    assert f"the checkpoint is quantised: 1 by {kind}" in " ".join(result.stdout.split())


def test_plain_weights_are_not_called_quantised():
    plain_floats = {"weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(2)}
    assert open_checkpoint(plain_floats).spec.notes == ()
    state = {"weight": torch.zeros(2, 2, dtype=torch.int8), "scales": torch.zeros(2), "a.qweight": torch.zeros(2)}
    assert open_checkpoint(state).spec.notes == ()


def test_loading_a_file_twice_gives_the_same_spec(tmp_path):
    save_file({"b": torch.zeros(2), "a": torch.zeros(3)}, tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").spec == open_checkpoint(str(tmp_path / "m.safetensors")).spec
    assert set(load_file(tmp_path / "m.safetensors")) == {"a", "b"}

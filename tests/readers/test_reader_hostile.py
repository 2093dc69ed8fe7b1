from __future__ import annotations

import contextlib
import struct
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hostile import DATA, SAFETENSORS, TORCH, bomb, entry, overlapping, safetensors, tensor, torch_zip, valid
from hypothesis import given, settings
from hypothesis import strategies as st

from automatch import CheckpointError, open_checkpoint
from automatch.cli import main
from automatch.readers import _limits, _pickle


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors(tmp_path, case):
    content, words = SAFETENSORS[case]
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("case", TORCH)
def test_hostile_torch_files(tmp_path, case):
    content, words = TORCH[case]
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.pt")


def test_the_command_line_refuses_every_hostile_file_in_one_line(tmp_path):
    (tmp_path / "model.pt").write_bytes(torch_zip(tensor(b"K\x02K\x02\x86", b"K\x02K\x01\x86")))
    cases = {
        f"{kind} {case}": (f"m.{kind}", content)
        for kind, all_of in (("safetensors", SAFETENSORS), ("pt", TORCH))
        for case, (content, _) in all_of.items()
    }
    cases |= {"bomb": ("m.pt", bomb()), "overlapping": ("m.pt", overlapping())}
    for case, (name, content) in cases.items():
        (tmp_path / name).write_bytes(content)
        for command in (["propose", "--model", str(tmp_path / "model.pt")], ["inspect"]):
            result = CliRunner().invoke(main, [command[0], str(tmp_path / name), *command[1:]])
            assert (result.exit_code, result.stdout) == (2, ""), case
            assert result.stderr.startswith("Error: "), case
            assert result.stderr.removesuffix("\n").isprintable(), case


def test_the_key_of_an_impossible_tensor_is_named(tmp_path):
    nan = b"G" + struct.pack(">d", float("nan")) + b"\x85"
    for shape, words in (
        (nan, "the shape of 'w' in .*m.pt is not a list of integers"),
        (b"K\x05\x85", r"'w' of .*m.pt has shape \[5\] and reaches"),
    ):
        (tmp_path / "m.pt").write_bytes(torch_zip(tensor(shape, b"K\x01\x85")))
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / "m.pt")


def test_a_header_of_ten_million_entries_is_not_read(tmp_path):
    """A hundred bytes each, as the shortest real ones have; the file is sparse."""
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 10**9) + b'{"a":')
        file.truncate(2 * 10**9)
    with pytest.raises(CheckpointError, match="declares 1000000000 bytes"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_a_pickle_of_more_operations_than_any_checkpoint_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(_pickle, "MAX_PICKLE_OPCODES", 100)
    (tmp_path / "m.pt").write_bytes(torch_zip(b"\x80\x02" + b"N0" * 60 + b"}."))
    with pytest.raises(CheckpointError, match="more than 100 operations"):
        open_checkpoint(tmp_path / "m.pt")


def test_the_builders_build_what_can_be_read(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(safetensors({"a": entry([1], 0, 4)}, bytes(4)))
    (tmp_path / "m.pt").write_bytes(torch_zip(tensor(b"K\x02K\x02\x86", b"K\x02K\x01\x86")))
    for name in ("m.safetensors", "m.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert float(checkpoint.tensor(checkpoint.spec.keys[0]).sum()) == 0.0


def test_zip_bombs(tmp_path):
    (tmp_path / "bomb.pt").write_bytes(bomb())
    with pytest.raises(CheckpointError, match=r"would inflate from .* more than 100 times"):
        open_checkpoint(tmp_path / "bomb.pt")
    (tmp_path / "overlap.pt").write_bytes(overlapping())
    with pytest.raises(CheckpointError, match="declare more bytes than the file has"):
        open_checkpoint(tmp_path / "overlap.pt")


def test_a_zip_directory_of_many_gigabytes_is_not_read(tmp_path):
    content = bytearray(torch_zip(b"\x80\x02}."))
    at = content.rindex(b"PK\x05\x06")
    struct.pack_into("<I", content, at + 12, 2**31)
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"directory .* has 2147483648 bytes"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("bound", ["MAX_TENSORS", "MAX_JSON_VALUES"])
def test_more_entries_than_any_checkpoint_has(tmp_path, monkeypatch, bound):
    """The bound is lowered, because ten million entries take a while to write."""
    monkeypatch.setattr(_limits, bound, 100)
    (tmp_path / "m.safetensors").write_bytes(safetensors({f"k{i}": entry([], 4 * i, 4 * i + 4) for i in range(101)}, bytes(404)))
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        open_checkpoint(tmp_path / "m.safetensors")
    if bound == "MAX_TENSORS":
        with pytest.raises(CheckpointError, match="declares 101 entries; at most 100 are read"):
            open_checkpoint({f"k{i}": __import__("torch").zeros(1) for i in range(101)})


GGUF = (DATA / "small.gguf").read_bytes()
FLAX = (DATA / "flax.msgpack").read_bytes()


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.gguf", patched(GGUF, 4, struct.pack("<I", 9)), "GGUF version 9"),
        ("m.gguf", patched(GGUF, 8, struct.pack("<Q", 2**63)), "declares 9223372036854775808 entries"),
        ("m.gguf", patched(GGUF, 16, struct.pack("<Q", 2**63)), "metadata fields"),
        ("m.gguf", patched(GGUF, 24, struct.pack("<Q", 2**63)), "a name in .* has 9223372036854775808 bytes"),
        ("m.gguf", GGUF.replace(b"attn_q", b"ffn_up"), "twice"),
        ("m.gguf", GGUF[:100], "truncated"),
        ("m.gguf", GGUF[:-64], "outside the file"),
        ("m.msgpack", b"\xdf\xff\xff\xff\xff", "truncated"),
        ("m.msgpack", b"\xdd\xff\xff\xff\xff", "truncated"),
        ("m.msgpack", b"\x91" * 5000, "nested too deeply"),
        ("m.msgpack", b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "truncated"),
        ("m.msgpack", b"\x81\xa1a\xc6\xff\xff\xff\xff\x01", "truncated"),
        ("m.msgpack", b"\x82\xa1a\x01\xa1a\x02", "'a' stands twice"),
        ("m.msgpack", b"\x81\xa1a\xc1", "not msgpack"),
        ("m.msgpack", b"\x81\x90\x01", "a key .* is a list"),
        ("m.msgpack", FLAX[:-5], "truncated"),
        ("m.msgpack", FLAX + b"x", "ends at byte"),
        ("m.msgpack", FLAX.replace(b"float32", b"float64", 1), "do not fit"),
    ],
)
def test_hostile_gguf_and_msgpack(tmp_path, name, content, words):
    pytest.importorskip("gguf")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / name)


def test_hdf5_that_leads_elsewhere_or_declares_too_much(tmp_path):
    h5py = pytest.importorskip("h5py")

    def refuse(words, build):
        with h5py.File(tmp_path / "m.h5", "w") as file:
            build(file)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(tmp_path / "m.h5")

    refuse("link to elsewhere", lambda file: file.__setitem__("w", h5py.ExternalLink("/etc/passwd", "/x")))
    refuse("link to elsewhere", lambda file: file.__setitem__("w", h5py.SoftLink("/")))
    refuse("lies in another file", lambda file: file.create_dataset("w", (4,), "f4", external=[("/etc/passwd", 0, 16)]))
    refuse("declares 4398046511104 bytes, but stores 0", lambda file: file.create_dataset("w", (2**40,), "f4", chunks=(1024,)))
    refuse("linked twice", lambda file: file.create_group("a").__setitem__("again", file))
    refuse("holds no tensors", lambda file: file.create_group("a"))
    (tmp_path / "m.h5").write_bytes((DATA / "keras.weights.h5").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged HDF5"):
        open_checkpoint(tmp_path / "m.h5")


# ---- damage at random ----------------------------------------------------------------------------

FILES = valid()
damage = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "delete", "number"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes) -> bytes:
    for kind, where, value in changes:
        at = int(where * len(content))
        if kind == "set":
            content = content[:at] + value + content[at + len(value) :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + value + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + len(value) :]
        else:
            content = content[:at] + b"\xff" * len(value) + content[at + len(value) :]
    return content


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150)
@given(changes=damage)
def test_a_damaged_file_gives_tensors_or_one_of_our_errors(tmp_path_factory, name, changes):
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(damaged(FILES[name], changes))
    with contextlib.suppress(CheckpointError), open_checkpoint(path) as checkpoint:
        for spec in checkpoint.spec:
            assert tuple(checkpoint.tensor(spec.key).shape) == spec.shape


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through resource")
def test_hostile_files_need_little_memory(tmp_path):
    """Every hostile file in one process of at most 3 GB of addresses, torch included."""
    for kind, cases in (("safetensors", SAFETENSORS), ("pt", TORCH)):
        for number, (content, _) in enumerate(cases.values()):
            (tmp_path / f"{number}.{kind}").write_bytes(content)
    (tmp_path / "bomb.pt").write_bytes(bomb())
    code = """
import resource, pathlib, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from automatch.errors import CheckpointError
from automatch.readers import open_checkpoint
count = 0
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        open_checkpoint(path)
    except CheckpointError:
        count += 1
print(count)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(len(SAFETENSORS) + len(TORCH) + 1), done.stderr

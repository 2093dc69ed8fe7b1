"""Writes the small files of other libraries that the reader tests read, each by the format's own library.

Not a test: it needs packages that the tests do not. To write them again::

    python -m venv .formats && .formats/bin/pip install flax keras gguf
    KERAS_BACKEND=jax .formats/bin/python tests/readers/make_files.py

and, with torch instead of those packages: ``python tests/readers/make_files.py distributed``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).with_name("data")


def values(*shape: int, dtype: str = "float32") -> np.ndarray:
    """1, 2, 3, … so that a test can say what it expects."""
    return np.arange(1, 1 + int(np.prod(shape)), dtype=dtype).reshape(shape)


def write_flax() -> None:
    import flax.linen as nn
    import flax.serialization as serialization
    import jax
    import jax.numpy as jnp

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            return nn.Dense(2)(x)

    variables = Net().init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    variables = jax.tree_util.tree_map(lambda leaf: jnp.asarray(values(*leaf.shape)), variables)
    (DATA / "flax.msgpack").write_bytes(serialization.to_bytes(variables))
    serialization.MAX_CHUNK_SIZE = 64
    chunked = {"params": {"big": values(6, 7), "half": jnp.ones((3,), jnp.bfloat16), "scalar": np.float32(3.0)}}
    (DATA / "flax_chunked.msgpack").write_bytes(serialization.msgpack_serialize(chunked))


def write_keras() -> None:
    import keras

    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    model.compile(optimizer="adam", loss="mse")
    model.fit(np.zeros((2, 8, 8, 3)), np.zeros((2, 2)), verbose=0)
    model.set_weights([values(*weight.shape) for weight in model.get_weights()])
    model.save_weights(DATA / "keras.weights.h5")
    model.save(DATA / "model.keras")


def write_gguf() -> None:
    import gguf

    writer = gguf.GGUFWriter(DATA / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", values(4, 32))
    writer.add_tensor("blk.0.attn_q.weight", values(2, 64, dtype="float16"))
    packed = gguf.quants.quantize(values(3, 64), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_distributed(rank: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29617", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(torch.arange(1.0, 15.0).reshape(7, 2), mesh, [Shard(0)])
    dcp.save({"sharded": sharded, "whole": torch.arange(1.0, 4.0)}, checkpoint_id=DATA / "dcp_two_ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    if "distributed" in sys.argv:
        import torch.multiprocessing

        torch.multiprocessing.spawn(write_distributed, nprocs=2)
        sys.exit()
    write_gguf()
    write_keras()
    write_flax()

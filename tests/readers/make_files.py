"""Writes the small files of other libraries that the reader tests read, each by the format's own library.

Not a test: it needs packages that the tests do not. To write them again::

    python -m venv .formats && .formats/bin/pip install flax keras gguf
    KERAS_BACKEND=jax .formats/bin/python tests/readers/make_files.py

and, with torch instead of those packages: ``python tests/readers/make_files.py distributed``; with lightning:
``python tests/readers/make_files.py lightning``; with deepspeed (on the CPU): ``python tests/readers/make_files.py deepspeed``.
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


def trained_model():
    """A small network whose parameters count from 1, and stay as they are at a learning rate of 0."""
    import torch
    from torch import nn

    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.from_numpy(values(*parameter.shape)))
    return net, torch.optim.AdamW(net.parameters(), lr=0.0)


def write_lightning() -> None:
    """What two ranks of Lightning's FSDP2 strategy write: a folder of shards and a `meta.pt`."""
    import lightning
    import torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Net(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.optimizer = None, None
            self.save_hyperparameters({"width": 16})

        def configure_model(self):
            if self.net is None:
                self.net, _ = trained_model()
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, _):
            return self.net(batch).sum()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = ModelParallelStrategy(save_distributed_checkpoint=True)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=1, **options)
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(8, 8), batch_size=4))
    trainer.save_checkpoint(DATA / "lightning_fsdp.ckpt")


def write_deepspeed() -> None:
    """What one rank of DeepSpeed writes without partitioned weights."""
    import os

    rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29618", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"DS_ACCELERATOR": "cpu", **rank}
    import deepspeed
    import torch

    net, optimizer = trained_model()
    config = {"train_batch_size": 4, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    engine.backward(engine(torch.ones(4, 8)).sum())
    engine.step()
    engine.save_checkpoint(DATA / "deepspeed")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    if "lightning" in sys.argv:
        write_lightning()
        sys.exit()
    if "deepspeed" in sys.argv:
        write_deepspeed()
        sys.exit()
    if "distributed" in sys.argv:
        import torch.multiprocessing

        torch.multiprocessing.spawn(write_distributed, nprocs=2)
        sys.exit()
    write_gguf()
    write_keras()
    write_flax()

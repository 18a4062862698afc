"""The batch: the contract between `data` and `model`.

A batch is a dict of fixed-shape arrays. The data pipeline packs and pads records of any length,
with any number of images of any size. So a program compiled for one batch serves every batch of
that shape. A row holds one or several documents, then padding.

key        shape       dtype    meaning
tokens     [B, L]      int32    token ids; anything at padding
segments   [B, L]      int32    index of the document in its row, from 1; 0 is padding
thw        [B, L, 3]   int32    position on the T, H and W axes; T restarts in each document
is_image   [B, L]      bool     True where the embedding comes from an image
patches    [B, P, C]   uint8    flattened patches (channel, y, x) in 2x2 block order; patches
                                4m..4m+3 give a row's m-th image token. float32 if they are
                                normalised already.
patch_hw   [B, P, 2]   int32    row and column of each patch on its image's 16-pixel grid

For training, with next-token targets of the same document:

targets    [B, L]      int32    the token after this one
weights    [B, L]      float32  weight of that token in the loss; 0 where there is no loss

P may be 0 for text. In 2x2 block order both convolutions are matrix products:

    patch grid 2 x 4, row-major      0 1 2 3      block order  0 1 4 5 | 2 3 6 7
                                     4 5 6 7
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from neo_jax.sharding import batch_rows, data_shard, partition_spec, put

Batch = Mapping[str, jax.Array]

# ImageNet statistics by which patches are normalised, per channel.
IMAGE_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
IMAGE_STD = np.array((0.229, 0.224, 0.225), np.float32)

RANK = {"tokens": 2, "segments": 2, "thw": 3, "is_image": 2, "patches": 3, "patch_hw": 3}
RANK |= {"targets": 2, "weights": 2}
# Partitions of a training batch [micro-batches, B, L or P, ...].
PARTITIONS = {
    name: partition_spec(None, "batch", "time", *[None] * (rank - 2)) for name, rank in RANK.items()
}


def to_device(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """Places a host batch on the mesh with its rows split; adds padding rows to fill the mesh."""
    rows = batch["tokens"].shape[0]
    missing = -rows % batch_rows(mesh)

    def place(name: str) -> jax.Array:
        array = np.pad(batch[name], [(0, missing)] + [(0, 0)] * (RANK[name] - 1))
        return put(array, mesh, "batch", *[None] * (RANK[name] - 1))

    return {name: place(name) for name in batch}


def micro_batches(batch: Mapping[str, np.ndarray], count: int, mesh: Mesh) -> Batch:
    """Places a training batch as `count` micro-batches: arrays [count, rows / count, ...].

    Rows and their columns are split over the mesh.

    Args:
      batch: this process's rows (`sharding.data_shard`); their number is a multiple of `count`
        times the parts that its devices hold.
    """
    _, shares = data_shard(mesh)

    def place(name: str) -> jax.Array:
        array = batch[name].reshape(count, -1, *batch[name].shape[1:])
        # A process feeds whole rows, even if its devices hold only some of their columns.
        shape = (count, array.shape[1] * shares, *array.shape[2:])
        sharding = NamedSharding(mesh, PARTITIONS[name])
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return {name: place(name) for name in RANK}

"""Our own checkpoints: an Orbax tree of parameters, written piece by piece.

Orbax saves arrays that are in memory, but a conversion must not hold a whole model. So the tree to
be saved consists of `LazyArray`s, which are read piece by piece while they are written, and
`LazyArrayHandler` is the Orbax type handler that does so. The result is an ordinary Orbax
checkpoint: any Orbax reader restores it, onto any mesh.
"""

import asyncio
import dataclasses
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from neo_jax.errors import InputError

Index = tuple[slice, ...]

# The largest piece, if the shape can be halved so far; and how many are in memory at once.
PIECE_BYTES = 64 * 2**20
PIECES_AT_ONCE = 3
# The size of the data files into which Orbax collects pieces; until then they stay in memory.
DATA_FILE_BYTES = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is not in memory: `read(index)` reads or computes a part of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # the shape of the pieces in which it is stored
    read: Callable[[Index], np.ndarray]
    on_bytes_written: Callable[[int], None] = lambda size: None  # called for each piece

    def pieces(self) -> Iterator[Index]:
        """The index of each piece."""
        for corner in np.ndindex(
            *(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))
        ):
            yield tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(corner, self.chunk, self.shape, strict=True)
            )


def choose_chunk(
    shape: tuple[int, ...], shard: tuple[int, ...], itemsize: int, is_layered: bool
) -> tuple[int, ...]:
    """The shape of stored pieces: one layer of a device's shard, halved down to PIECE_BYTES."""
    chunk = [1, *shard[1:]] if is_layered else list(shard)
    for axis in range(is_layered, len(shape)):
        while math.prod(chunk) * itemsize > PIECE_BYTES and chunk[axis] % 2 == 0:
            chunk[axis] //= 2
    return tuple(chunk)


class LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `LazyArray` as an ordinary array, piece by piece."""

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        # No flush to disk for each piece: `directory.new_directory` flushes once, at the end.
        context = ts.Context({"file_io_sync": False}, infos[0].ts_context)
        with ThreadPoolExecutor(PIECES_AT_ONCE) as threads:
            for value, info, arg in zip(values, infos, args, strict=True):
                await info.await_path_creation()
                spec = ocp.type_handlers.get_json_tspec_write(
                    info,
                    use_ocdbt=True,
                    global_shape=value.shape,
                    local_shape=value.chunk,
                    dtype=value.dtype,
                    process_index=jax.process_index(),
                    arg=arg,
                )
                store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
                await _write_pieces(value, store, threads)
        return []


async def _write_pieces(value: LazyArray, store: ts.TensorStore, threads: ThreadPoolExecutor):
    loop, slots = asyncio.get_running_loop(), asyncio.Semaphore(PIECES_AT_ONCE)

    async def write(index: Index):
        async with slots:
            piece = await loop.run_in_executor(threads, value.read, index)
            await store[index].write(piece, can_reference_source_data_indefinitely=True)
            value.on_bytes_written(piece.nbytes)

    await asyncio.gather(*(write(index) for index in value.pieces()))


def write_tree(directory: Path, tree: dict) -> None:
    """Writes a nested dict of `LazyArray`s as an Orbax checkpoint."""
    registry = ocp.type_handlers.create_type_handler_registry((LazyArray, LazyArrayHandler()))
    # Trained weights hardly compress.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            directory.absolute(),
            args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=DATA_FILE_BYTES),
        )


def read_tree(directory: Path, target: dict) -> dict:
    """Restores an Orbax checkpoint to the shapes, dtypes and shardings of `target`.

    Raises:
      InputError: naming the directory, if it is damaged or holds other parameters.
    """
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(directory.absolute(), args=ocp.args.StandardRestore(target))
    except Exception as error:  # what Orbax raises for damage is of many kinds
        raise InputError(f"{directory}: cannot restore: {error}") from error


def open_tree(directory: Path) -> dict[tuple[str, ...], ts.TensorStore]:
    """Opens the arrays of an Orbax checkpoint, by path. Reads no array.

    `store[index].read().result()` reads a part of one.

    Raises:
      InputError: naming the directory, if it is not a checkpoint or is damaged.
    """
    directory = directory.absolute()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(directory).item_metadata
        if metadata is None:
            raise ValueError("no Orbax checkpoint")
        is_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(directory)
        context = ocp.type_handlers.get_ts_context(use_ocdbt=is_ocdbt)
        stores = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(metadata.tree):
            info = ocp.type_handlers.ParamInfo(
                name=leaf.name,
                parent_dir=epath.Path(directory),
                is_ocdbt_checkpoint=is_ocdbt,
                use_zarr3=metadata.use_zarr3,
                ts_context=context,
            )
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=is_ocdbt)
            store = ts.open(ts.Spec(spec), open=True, context=context).result()
            stores[tuple(entry.key for entry in path)] = store
        return stores
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{directory}: cannot read: {error}") from error

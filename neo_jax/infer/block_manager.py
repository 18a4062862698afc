"""Blocks and lanes of all devices: which sequence has which, and where its prefix is cached."""

import heapq

from neo_jax.infer.block_pool import BlockPool
from neo_jax.infer.sequence import Sequence

# The share of a pool that admission leaves free, so that what runs can grow.
_WATERMARK = 0.01


class BlockManager:
    """Block pools, free lanes and the hashes that running prefills are going to compute."""

    def __init__(self, devices: int, lanes: int, num_blocks: int, block_size: int, reuse: bool):
        self.pools = [BlockPool(num_blocks) for _ in range(devices)]
        self.num_running = [0] * devices
        self._free_lanes = [list(range(lanes)) for _ in range(devices)]  # heaps
        self._block_size, self._reuse = block_size, reuse
        self._watermark = int(_WATERMARK * num_blocks) + 1
        self._computing: dict[bytes, Sequence] = {}

    @property
    def has_free_lane(self) -> bool:
        return any(self._free_lanes)

    def find_prefixes(self, sequence: Sequence) -> list[tuple[int, list[int]]]:
        """Per device with a free lane, the blocks that hold the sequence's first tokens there.

        At least one token is left to compute, because its logits are needed.
        """
        hashes = sequence.block_hashes[: (sequence.num_tokens - 1) // self._block_size]
        return [
            (device, self.pools[device].find(hashes))
            for device, lanes in enumerate(self._free_lanes)
            if lanes
        ]

    def find_computing(self, sequence: Sequence, index: int) -> tuple[bytes, Sequence] | None:
        """The last of the blocks from `index` on that running prefills will have computed.

        Only where a lane is free, so that the sequence can go there.
        """
        found = None
        last = (sequence.num_tokens - 1) // self._block_size
        for block_hash in sequence.block_hashes[index:last]:
            holder = self._computing.get(block_hash)
            if holder is None or not self._free_lanes[holder.device]:
                break
            found = block_hash, holder
        return found

    def has_room(self, sequence: Sequence, device: int, cached: list[int]) -> bool:
        """Whether the whole sequence fits, and some growth of what runs on the device."""
        pool, running = self.pools[device], self.num_running[device]
        needed = -(-sequence.num_tokens // self._block_size) - len(cached)
        needed += sum(not pool.count(block) for block in cached)  # they are available till then
        if running:
            needed += max(self._watermark, running)
        return needed <= pool.num_available

    def start(self, sequence: Sequence, device: int, cached: list[int]) -> None:
        """Gives a sequence a lane and all blocks of its tokens."""
        pool, size = self.pools[device], self._block_size
        for block in cached:
            pool.share(block)
        missing = -(-sequence.num_tokens // size) - len(cached)
        sequence.blocks = cached + [pool.allocate() for _ in range(missing)]
        sequence.device, sequence.lane = device, heapq.heappop(self._free_lanes[device])
        sequence.num_registered = len(cached)
        sequence.num_computed_tokens = len(cached) * size
        self.num_running[device] += 1
        for block_hash in sequence.block_hashes[len(cached) :]:
            self._computing.setdefault(block_hash, sequence)

    def stop(self, sequence: Sequence) -> list[bytes]:
        """Takes blocks and lane away; returns the hashes that it will not compute any more."""
        given_up = [
            block_hash
            for block_hash in sequence.block_hashes[sequence.num_registered :]
            if self._computing.get(block_hash) is sequence
        ]
        for block_hash in given_up:
            del self._computing[block_hash]
        self.pools[sequence.device].release(sequence.blocks)
        heapq.heappush(self._free_lanes[sequence.device], sequence.lane)
        self.num_running[sequence.device] -= 1
        sequence.forget_place()
        return given_up

    def register(self, sequence: Sequence) -> list[bytes]:
        """Makes its full blocks findable whose tokens are computed and known; returns the new."""
        num_full = min(sequence.num_computed_tokens, sequence.num_tokens) // self._block_size
        if not self._reuse or num_full == sequence.num_registered:
            return []
        sequence.hash_blocks(self._block_size)
        hashes = sequence.block_hashes[sequence.num_registered : num_full]
        pool = self.pools[sequence.device]
        for block, block_hash in zip(
            sequence.blocks[sequence.num_registered : num_full], hashes, strict=True
        ):
            pool.register(block, block_hash)
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.num_registered = num_full
        return hashes

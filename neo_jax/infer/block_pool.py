"""The blocks of one device's key-value cache: who uses them, and what can be found in them.

```
allocate ──► used (count >= 1) ──release──► free           if its contents have no hash
   ▲              ▲                    └──► cached         if they have: findable, count 0
   └── free first, then the least          │
       recently used cached block ◄────────┘──share──► used
```
"""

import collections

# Padding rows and inactive lanes write here, so it is never allocated.
NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 to `num_blocks` - 1 with reference counts, and a prefix cache of full ones."""

    def __init__(self, num_blocks: int):
        self._counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        # Blocks with a hash that nobody uses, the least recently used first.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody uses but that can be found by their hash."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._counts) - 1 - self.num_available

    def count(self, block: int) -> int:
        """How many sequences use a block."""
        return self._counts[block]

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks with the first of these hashes, used or not, up to one that is missing."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def allocate(self) -> int:
        """A block with count 1 and no hash.

        Raises:
          RuntimeError: when none is available.
        """
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._by_hash[self._hashes[block]]
            self._hashes[block] = None
        else:
            raise RuntimeError("no block is available: look at num_available first")
        self._counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence uses a block that was found by its hash."""
        if not self._counts[block]:
            del self._cached[block]
        self._counts[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One sequence less uses its blocks, given in the order of its tokens.

        The last blocks become the least recently used ones: without those before them they could
        not be found.
        """
        for block in reversed(blocks):
            if not self._counts[block]:
                raise RuntimeError(f"block {block} is released but not in use")
            self._counts[block] -= 1
            if self._counts[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Makes a full block findable. Of blocks with equal contents the first one is kept."""
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._by_hash[block_hash] = block
            self._hashes[block] = block_hash

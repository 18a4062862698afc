"""Blocks are counted, found by their contents, and given away least recently used first."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.infer.block_pool import NULL_BLOCK, BlockPool


def used_and_released(pool, *hashes):
    """One block per hash, used and released one after the other."""
    blocks = [pool.allocate() for _ in hashes]
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.register(block, block_hash)
        pool.release([block])
    return blocks


def test_the_null_block_is_never_allocated():
    pool = BlockPool(4)
    assert sorted(pool.allocate() for _ in range(3)) == [1, 2, 3]
    assert NULL_BLOCK == 0
    with pytest.raises(RuntimeError, match="no block is available"):
        pool.allocate()


def test_a_released_block_is_found_by_its_hash():
    pool = BlockPool(4)
    (block,) = used_and_released(pool, b"a")
    assert (pool.num_used, pool.num_cached, pool.num_available) == (0, 1, 3)
    assert pool.find([b"a", b"b"]) == [block]
    pool.share(block)
    assert (pool.num_used, pool.num_cached, pool.count(block)) == (1, 0, 1)


def test_a_chain_is_found_up_to_what_is_missing():
    pool = BlockPool(5)
    a, _, c = used_and_released(pool, b"a", b"b", b"c")
    assert pool.find([b"a", b"x", b"c"]) == [a]
    assert pool.find([b"c"]) == [c]
    assert pool.find([]) == []


def test_a_shared_block_is_released_by_everyone():
    pool = BlockPool(3)
    block = pool.allocate()
    pool.register(block, b"a")
    pool.share(block)
    pool.release([block])
    assert (pool.count(block), pool.num_cached) == (1, 0)
    pool.release([block])
    assert (pool.count(block), pool.num_cached) == (0, 1)
    with pytest.raises(RuntimeError, match="not in use"):
        pool.release([block])


def test_free_blocks_are_taken_before_cached_ones():
    pool = BlockPool(4)
    used_and_released(pool, b"a", b"b")
    pool.allocate()
    assert pool.num_cached == 2


def test_the_least_recently_used_block_is_given_away():
    pool = BlockPool(4)
    a, b, c = used_and_released(pool, b"a", b"b", b"c")
    pool.share(a)
    pool.release([a])
    assert [pool.allocate() for _ in range(3)] == [b, c, a]
    assert pool.find([b"a"]) == pool.find([b"b"]) == []


def test_of_one_sequence_the_last_block_is_given_away_first():
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    for block, block_hash in zip(blocks, [b"a", b"b", b"c"], strict=True):
        pool.register(block, block_hash)
    pool.release(blocks)
    assert pool.allocate() == blocks[2]
    assert pool.find([b"a", b"b", b"c"]) == blocks[:2]


def test_of_equal_contents_the_first_block_is_kept():
    pool = BlockPool(3)
    first, second = pool.allocate(), pool.allocate()
    pool.register(first, b"a")
    pool.register(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.release([second])
    assert (pool.num_cached, pool.num_available) == (0, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5))))
def test_blocks_are_never_lost(operations):
    pool, held = BlockPool(6), []
    for operation, number in operations:
        block_hash = bytes([number])
        if operation == "allocate" and pool.num_available:
            held.append(pool.allocate())
            pool.register(held[-1], block_hash)
        elif operation == "share" and (found := pool.find([block_hash])):
            pool.share(found[0])
            held += found
        elif operation == "release" and held:
            pool.release([held.pop(number % len(held))])
        assert [pool.count(block) for block in range(6)] == [held.count(b) for b in range(6)]
        assert (pool.num_used, pool.num_available) == (len(set(held)), 5 - len(set(held)))

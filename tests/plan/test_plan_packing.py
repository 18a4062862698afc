"""Counts that plans make themselves: packed rows, blocks of attention, kernels' bundles, FLOPs."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernel_cycles
from helpers.golden import raises
from neo_jax.configs import models
from neo_jax.kernels.intervals import intervals
from neo_jax.model.neo import abstract_params, count_params
from neo_jax.plan import attention_cycles, costs, hlo, packing
from neo_jax.plan.chips import CHIPS
from neo_jax.plan.kernel_costs import PRODUCTS, STREAM_BLOCK, STREAMED
from neo_jax.train import param_paths


@pytest.mark.parametrize("mix", [*packing.MIXES, packing.CAUSAL])
def test_visited_blocks_are_those_with_something_to_see(mix):
    length = 9000 if mix == "video" else 5000
    for row in packing.sample_rows(mix, length, 3):
        key = np.arange(length)
        mask = (key >= row.start[:, None]) & (key < row.end[:, None])
        for block_q, block_k in ((512, 512), (256, 1024), (1000, 300)):
            not_empty, full = 0, 0
            for i in range(0, length, block_q):
                for j in range(0, length, block_k):
                    block = mask[i : i + block_q, j : j + block_k]
                    not_empty += block.any()
                    full += block.all() and block.shape == (block_q, block_k)
            assert packing.count_blocks(row, block_q, block_k) == (not_empty, full)


def test_packed_rows_follow_the_attention_rule():
    documents = [[("text", 3), ("image", 4), ("text", 2)], [("image", 2), ("text", 1)]]
    row = packing.build_row(documents, 15)
    t = [[0, 1, 2, 3, 3, 3, 3, 4, 5, 0, 0, 1, 0, 0, 0]]
    segments = [[1] * 9 + [2] * 3 + [0] * 3]
    start, end = intervals(jnp.array(t), jnp.array(segments))
    np.testing.assert_array_equal(row.start, start[0])
    np.testing.assert_array_equal(row.end, end[0])
    assert (row.tokens, row.image_tokens) == (12, 6)
    assert row.keys == 1 + 2 + 3 + 4 * 7 + 8 + 9 + 2 * 2 + 3


def test_rows_are_packed_whole_and_without_documents_that_do_not_fit():
    rows = packing.sample_rows("sft", 8192, 40)
    assert np.mean([row.tokens for row in rows]) > 0.9 * 8192
    assert max(row.tokens for row in rows) <= 8192
    with raises("no document", "100"):
        packing.sample_rows("sft", 100, 1)
    with raises("nonsense", "caption"):
        packing.sample_rows("nonsense", 100, 1)


def test_kernels_take_their_steps_for_every_visit_and_group_of_heads():
    steps = attention_cycles.Steps(block_q=512, block_k=512, masked=100, full=80, step=10)
    assert steps.cycles(blocks=7, full=3, groups=8, heads_of_group=2) == 8 * (
        2 * (4 * 100 + 3 * 80) + 7 * 10
    )
    for kernel, chips in (attention_cycles.table() | attention_cycles.streamed()).items():
        assert {"v5e", "v5p", "v6e", "v7x"} <= chips.keys(), kernel
    assert {*attention_cycles.table(), *attention_cycles.streamed()} == {*PRODUCTS, *STREAMED}


def test_kernels_that_stream_take_their_blocks_or_memory():
    chip = CHIPS["v5e"]
    call = hlo.parse(
        """HloModule m

ENTRY %main (p: bf16[1,8192,4096]) -> bf16[1,8192,4096] {
  %p = bf16[1,8192,4096]{2,1,0} parameter(0)
  ROOT %norm_rope_forward.3 = bf16[1,8192,4096]{2,1,0} custom-call(%p)
}
"""
    )["main"]
    kernels = attention_cycles.Attention(chip, (), 1.0, 8, 2, (256, 128))
    blocks = 8192 * 4096 / STREAM_BLOCK
    cycles = attention_cycles.streamed()["norm_rope_forward"]["v5e"]
    memory = 2 * 2 * 8192 * 4096 / chip.hbm_bandwidth
    assert kernels.work(call.root, call).seconds == max(blocks * cycles / chip.clock, memory)


@pytest.mark.parametrize("name", ["NEO_OV_2B", "NEO_OV_9B"])
def test_model_flops_are_six_for_each_weight_and_token(name):
    c = getattr(models, name)
    rows = packing.sample_rows("text", 4096, 2)
    tokens, keys = sum(row.tokens for row in rows), sum(row.keys for row in rows)
    layers = count_params(dataclasses.replace(c, vocab_size=1)) - _other(c)
    width = c.qk_width + c.head_dim
    wanted = 6 * tokens * (layers + c.vocab_size * c.hidden_size)
    wanted += 6 * keys * c.num_layers * c.num_attention_heads * width
    # Of the parameters of layers, norms are in no product.
    assert costs.model_flops(c, (".*",), rows) == pytest.approx(wanted, rel=1e-4)


def _other(c) -> int:
    """The number of parameters outside of layers, with a vocabulary of 1."""
    params = abstract_params(dataclasses.replace(c, vocab_size=1))
    outside = [
        path for path in param_paths.all_paths(params) if not re.match("pre_buffer|post_llm", path)
    ]
    return sum(leaf.size for leaf in jax.tree.leaves(param_paths.split_params(params, outside)[0]))


def test_frozen_weights_need_no_gradients():
    c, rows = models.TINY, packing.sample_rows("text", 4096, 1)
    tokens = rows[0].tokens
    whole = costs.model_flops(c, (".*",), rows)
    without = costs.model_flops(c, (r"(?!post_llm/mlp).*",), rows)
    mlp = 3 * c.hidden_size * c.intermediate_size * c.num_post_llm_layers
    assert whole - without == 2 * tokens * mlp


BUNDLES = """
= control target key start
LB: loop body
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %s2 = sld [smem:[#a]] }
   0x2   : > { %9 = sbr.rel (%p1) target = $region4 }
  0x10 PF: > { %s3 = sand.u32 1, %s2 } /* Start/End empty region 4 :: Start region 5 */
  0x12   : > { %10 = sbr.rel (%p2) target = $region8 }
 0x112 PF: > { %s4 = sand.u32 1, %s2 } /* Start/End empty region 8 :: Start region 9 */
 0x114   : > { %11 = sbr.rel (%p3) target = $region12 }
 0x1f4 PF: > { %s5 = sadd.s32 1, %s2 } /* Start/End empty region 12 */
 0x1ff   :  { %12 = sbr.rel (!%p4) target = $region2 }
 0x205   :  { %13 = vsyncpa [#a], 1 }
"""


def test_bundles_of_a_kernel_are_those_of_its_bodies_and_the_rest():
    counts = kernel_cycles.count(BUNDLES.replace("sld [", "sld /* Start region 2 */ ["))
    assert (counts.masked, counts.full) == (0x100, 0xE0)
    assert counts.step == 0x1FF - 0x1 - 0x100 - 0xE0
    with raises("no loop"):
        kernel_cycles.count("   0x1   :  { %s1 = smov.u32 0 }")

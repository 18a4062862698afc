"""The jitted programs driven by hand, without a scheduler."""

import itertools

import jax
import numpy as np
import pytest

from helpers.chunks import PromptChunk, lay_out
from helpers.golden import arrays, load_case
from neo_jax import Sampling
from neo_jax.data.example import make_example
from neo_jax.infer import programs, sampling
from neo_jax.model.kv_cache import STACKS
from neo_jax.model.layer_stack import place_for_inference
from neo_jax.sharding import batch_rows, put

PROMPTS = ("single_image", "multi_image", "text_only")
SIZE, MAX_BLOCKS, LANES = 16, 12, 3
STEPS = 20


def on(mesh, array):
    array = np.asarray(array)
    return put(array, mesh, "batch", *[None] * (array.ndim - 1))


class Programs:
    """A state and what a runner would keep beside it."""

    def __init__(self, neo, kv_dtype="float32"):
        self.neo, self.mesh, self.devices = neo, neo.mesh, batch_rows(neo.mesh)
        stacks = {name: neo.params[name] for name in STACKS if name in neo.params}
        self.params = {**neo.params, **place_for_inference(stacks, neo.mesh)}
        blocks = 1 + LANES * MAX_BLOCKS
        with jax.set_mesh(self.mesh):
            self.state = programs.new_state(
                neo.config, self.params, LANES, blocks, MAX_BLOCKS, kv_dtype, SIZE
            )

    def prefill(self, chunks, rows, context, lanes, index, settings, samples=True):
        """Returns the token after each chunk."""
        batch, where, last = lay_out(chunks, rows, SIZE, context, self.mesh)
        count = rows * self.devices
        is_last_r, lane_r, index_r = np.zeros(count, bool), *np.zeros((2, count), np.int32)
        tables, given = np.zeros((count, MAX_BLOCKS), np.int32), [Sampling()] * count
        for row, one, lane in zip(last, chunks, lanes, strict=True):
            is_last_r[row], lane_r[row], index_r[row], given[row] = samples, lane, index, settings
            tables[row, : len(one.blocks)] = one.blocks
        arrays = {"is_last_r": is_last_r, "lane_r": lane_r, "index_r": index_r}
        arrays |= {"block_table_rn": tables, "settings": sampling.row_settings(given)}
        rows = where | {"batch": batch} | jax.tree.map(lambda a: on(self.mesh, a), arrays)
        with jax.set_mesh(self.mesh):
            tokens, self.state = programs.prefill(self.neo.config, self.params, self.state, rows)
        return [int(np.asarray(tokens)[row]) for row in last]

    def decode(self, blocks):
        """`blocks`: of each global lane, 0 where it is not active."""
        with jax.set_mesh(self.mesh):
            tokens, self.state = programs.decode(
                self.neo.config, self.params, self.state, on(self.mesh, np.int32(blocks))
            )
        return np.asarray(tokens)

    def set_seen(self, device, lane, ids):
        vocab = self.neo.config.vocab_size
        ids = np.pad(np.int32(ids), (0, 8), constant_values=vocab)
        with jax.set_mesh(self.mesh):
            self.state = programs.set_seen(self.state, np.int32(device), np.int32(lane), ids)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_official_tokens_in_lanes_of_one_pool(mesh, penalty):
    neo, golden = load_case("generate", mesh), arrays("generate", "generate.npz")
    run, settings = Programs(neo), Sampling(repetition_penalty=penalty)
    chunks, lanes, rng = [], [], np.random.default_rng(0)
    free = [list(rng.permutation(np.arange(1, 1 + LANES * MAX_BLOCKS))) for _ in range(2)]
    for number, name in enumerate(PROMPTS):
        patches = golden.get(f"{name}_pixel_values", np.zeros((0, 768), np.float32))
        prompt = golden[f"{name}_prompt_ids"], patches, golden[f"{name}_grid_hw"]
        device = number % run.devices
        blocks = [int(free[device].pop()) for _ in range(MAX_BLOCKS)]
        example = make_example(*prompt, neo.tokenizer)
        chunks.append(PromptChunk(example, blocks, 0, len(example.tokens), device))
        lanes.append(LANES - 1 - number)
    # What a lane's last request has seen is no concern of the next one's.
    for one, lane in zip(chunks, lanes, strict=True):
        run.set_seen(one.device, lane, np.arange(100))
        run.set_seen(one.device, lane, [])
    answers = [[token] for token in run.prefill(chunks, 24, 0, lanes, 0, settings)]
    for step in range(STEPS - 1):
        blocks = np.zeros(LANES * run.devices, np.int32)
        places = [one.device * LANES + lane for one, lane in zip(chunks, lanes, strict=True)]
        for place, one in zip(places, chunks, strict=True):
            blocks[place] = one.blocks[(one.stop + step) // SIZE]
        tokens = run.decode(blocks)
        for answer, place in zip(answers, places, strict=True):
            answer.append(int(tokens[place]))
    kind = "generated_ids" if penalty == 1 else "reppen_generated_ids"
    for name, answer in zip(PROMPTS, answers, strict=True):
        assert answer == golden[f"{name}_{kind}"][:STEPS].tolist(), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)], ids=str)
def test_a_sequence_goes_on_in_other_blocks_after_it_was_preempted(mesh):
    """Prompt and sampled tokens are put in again, in chunks, beside a lane that goes on."""
    neo, golden = load_case("generate", mesh), arrays("generate", "generate.npz")
    wanted = golden["text_only_reppen_generated_ids"].tolist()
    prompt = golden["text_only_prompt_ids"].tolist()
    run, settings = Programs(neo), Sampling(repetition_penalty=1.3)
    known, device = 10, run.devices - 1
    nothing = np.zeros((0, 768), np.float32), np.zeros((0, 2), np.int32)
    example = make_example(prompt + wanted[:known], *nothing, neo.tokenizer)
    blocks, stop = [9, 3, 7, 2, 11, 5], len(example.tokens)
    cuts = [0, 5, SIZE, stop - 3, stop]
    for start, end in itertools.pairwise(cuts):
        if end == stop:
            run.set_seen(device, 1, wanted[:known])
        chunk = PromptChunk(example, blocks, start, end, device)
        context = len(blocks) if start else 0
        (token,) = run.prefill([chunk], 6, context, [1], known, settings, end == stop)
    answer, lane = [token], device * LANES + 1
    for position in range(stop, stop + 8):
        row = np.zeros(LANES * run.devices, np.int32)
        row[lane] = blocks[position // SIZE]
        answer.append(int(run.decode(row)[lane]))
    assert answer == wanted[known : known + 9]
    assert int(np.asarray(run.state["index_b"])[lane]) == known + 9

"""A random model whose answers are decided, and mixed requests for it."""

import dataclasses
import functools

import jax
import numpy as np
from PIL import Image

import neo_jax
from benchmarks.random_checkpoint import write_checkpoint
from neo_jax import Request, Sampling
from neo_jax.configs.models import TINY

CONFIG = dataclasses.replace(
    TINY, num_post_llm_layers=1, num_attention_heads=8, num_key_value_heads=4, head_dim=16
)


def model_loader(directory):
    """Writes the model; returns a function that loads it on a mesh."""
    write_checkpoint(directory / "hf", CONFIG, dtype="F32")

    @functools.cache
    def on(*mesh):
        neo = neo_jax.load(directory / "hf", dtype="float32", mesh=mesh)
        neo.params = jax.tree.map(lambda leaf: leaf * 4, neo.params)  # so that no two are close
        return neo

    return on


def image(seed, height=64, width=96):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def mixed_requests(count, new=14):
    """Text of 10 to 2000 tokens, 1 to 5 images, and videos; different lengths of answer.

    Every fifth is sampled.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        text = "".join(map(chr, rng.integers(97, 122, rng.integers(3, 60))))
        sampling = Sampling(max_new_tokens=int(rng.integers(1, new)))
        if i % 5 == 4:
            sampling = dataclasses.replace(sampling, temperature=1.0, top_k=20, top_p=0.95, seed=i)
        options = {"sampling": sampling, "min_pixels": 1024}
        if i % 4 == 0:
            yield Request(text * int(rng.integers(1, 30)), **options)
        elif i % 4 == 3:
            frames = [image(100 + i + k, 32, 64) for k in range(5)]
            yield Request(text, video=frames, video_options={"num_frames": 4}, **options)
        else:
            sizes = rng.integers(1, 9, (1 + i % 5, 2)) * 32
            images = [image(i + k, *size) for k, size in enumerate(sizes)]
            yield Request("<image>" * len(images) + text, images, **options)


def tokens_of(results):
    assert [result.error for result in results] == [None] * len(results)
    return [result.token_ids for result in results]

"""The three training stages of NEO-ov as settings; `configs/neo_ov_*` has a file a stage and size.

Each value has its source: [ov] the NEO-ov paper (arXiv 2605.28820), [1.0] the NEO paper
(arXiv 2510.14979), [kit] the public training kit, [ours].
"""

import dataclasses

from neo_jax.configs.models import NEO_OV_2B
from neo_jax.data.pipeline import DataConfig
from neo_jax.model_config import ModelConfig
from neo_jax.train.optimizer import OptimConfig
from neo_jax.train.train_config import Config

# The parameters that pre-training trains [ov]: those that a plain Qwen3 lacks.
NEW_PARAMETERS = (
    "patch_embed/.*",
    "pre_buffer/.*",
    r"post_llm/attention/[qk]_(hw_.*|norm_(hw|h|w))",
)

_COMMON = Config(
    data=DataConfig(
        rows=128,  # [ov] a packed row on each of 128 devices
        min_pixels=256**2,  # [ov]
        max_frames=128,  # [ov]
        weights="square",  # [kit]
        workers=8,  # [ours]
    ),
    optim=OptimConfig(
        betas=(0.9, 0.95),  # [kit]; [1.0] has (0.9, 0.999)
        eps=1e-8,  # [1.0]
        weight_decay=0.01,  # [1.0], [kit]
        clip_norm=1.0,  # [kit]
    ),
    mesh=(1, -1, 1),  # [ours] parameters and moments sharded over all devices
    remat="full",  # [kit] gradient checkpointing in each layer
)


def pre_training(model: ModelConfig) -> Config:
    """PT: 20 M image-text pairs [ov]; trains the new parameters, with the Qwen3 frozen."""
    return _stage(
        model,
        steps=20_000_000 // 2560,  # [ov] samples / [kit] samples per step
        length=16384,  # [kit]
        max_pixels=4_194_304,  # [kit] 2048^2; [ov] has up to 4096^2
        peak_lr=2e-4,  # [ov]; [1.0] and [kit] 8e-4
        min_lr_ratio=0.1,  # [kit]; [1.0] 0.05
        trainable=NEW_PARAMETERS,
    )


def mid_training(model: ModelConfig) -> Config:
    """MT: 60 M samples, text : image : multi-image : video = 2:4:1:1 [ov], all parameters.

    Write the mixture with weights: "text.jsonl@2,image.jsonl@4,multi.jsonl@1,video.jsonl@1". The
    second half of [ov] has rows of 36 K tokens: a second run with data.length=36864 start=...
    """
    return _stage(
        model,
        steps=60_000_000 // 1024,  # [ov] samples / [kit] samples per step
        length=32768 if _is_small(model) else 18432,  # [kit]; [ov] 16 K, then 36 K
        max_pixels=16_777_216,  # [ov] 4096^2
        peak_lr=5e-5,  # [ov], [kit]; [1.0] 4e-5
        min_lr_ratio=0.2,  # [kit]; [1.0] 0.1
    )


def fine_tuning(model: ModelConfig) -> Config:
    """SFT: 6 M samples [ov], all parameters."""
    return _stage(
        model,
        steps=6_000_000 // 512,  # [ov] samples / [kit] samples per step
        length=34816 if _is_small(model) else 18432,  # [kit]
        max_pixels=16_777_216,  # [ov] 4096^2
        peak_lr=5e-5,  # [ov], [1.0]; [kit] 6e-5
        min_lr_ratio=0.1,  # [kit]; [1.0] 0
    )


def _stage(
    model: ModelConfig,
    *,
    steps: int,
    length: int,
    max_pixels: int,
    peak_lr: float,
    min_lr_ratio: float,
    trainable: tuple[str, ...] = (".*",),
) -> Config:
    optim = dataclasses.replace(
        _COMMON.optim,
        peak_lr=peak_lr,
        min_lr_ratio=min_lr_ratio,
        warmup_steps=max(1, steps // 100),  # [ov] a ratio of 0.01
    )
    return dataclasses.replace(
        _COMMON,
        data=dataclasses.replace(_COMMON.data, length=length, max_pixels=max_pixels),
        optim=optim,
        steps=steps,
        trainable=trainable,
    )


def _is_small(model: ModelConfig) -> bool:
    return model.hidden_size <= NEO_OV_2B.hidden_size

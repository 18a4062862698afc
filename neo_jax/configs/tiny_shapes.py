"""The default config: a tiny NEO learns to answer questions about synthetic images.

The images are made in memory, so nothing is downloaded. It takes minutes on two CPU cores.
"""

from neo_jax.data.pipeline import DataConfig
from neo_jax.data.synthetic import NAME, VOCABULARY
from neo_jax.demo.demo_report import report
from neo_jax.infer.api import Pipeline
from neo_jax.model_config import ModelConfig
from neo_jax.train.loop import Finished
from neo_jax.train.optimizer import OptimConfig
from neo_jax.train.train_config import Config

MODEL = ModelConfig(
    hidden_size=128,
    intermediate_size=256,
    num_pre_buffer_layers=1,
    num_post_llm_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCABULARY,
    vision_hidden_size=256,
    rope_theta=1e4,
    rope_theta_hw=1e2,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    min_pixels=4096,
    max_pixels=65536,
    dtype="float32",
)


def get_config() -> Config:
    return Config(
        workdir="runs/tiny_shapes",
        model=MODEL,
        tokenizer=NAME,
        data=DataConfig(
            mixture="shapes:short",
            length=256,
            num_patches=384,
            rows=16,
            min_pixels=4096,
            max_pixels=65536,
            packing_rows=32,
        ),
        held_out="shapes:held-out",
        optim=OptimConfig(peak_lr=2e-3, min_lr_ratio=0.02, warmup_steps=50, weight_decay=0.05),
        steps=650,
        init_scale=2.5,
        dtype="float32",
        mesh=(1, 1, 1),
        remat="none",
        log_every=50,
        save_every=500,
    )


def after(config: Config, finished: Finished) -> None:
    """Reports the held-out accuracy, draws figures, and prints a command that asks the model."""
    neo = Pipeline(finished.config, finished.params, finished.tokenizer, finished.mesh)
    report(neo, config.workdir)
    print(
        f"try it: python infer.py ask --model {config.workdir} --dtype float32 "
        f'--image {config.workdir}/example.png "What shape is it?"'
    )

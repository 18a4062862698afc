"""Model sizes: the published ones, and a tiny one for tests and laptops."""

from neo_jax.model_config import ModelConfig

NEO_OV_2B = ModelConfig(
    hidden_size=2048,
    intermediate_size=6144,
    num_pre_buffer_layers=12,
    num_post_llm_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)

NEO_OV_9B = ModelConfig(
    hidden_size=4096,
    intermediate_size=12288,
    num_pre_buffer_layers=6,
    num_post_llm_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)

TINY = ModelConfig(
    hidden_size=64,
    intermediate_size=128,
    num_pre_buffer_layers=1,
    num_post_llm_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=600,
    vision_hidden_size=32,
    dtype="float32",
)

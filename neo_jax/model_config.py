"""The configuration of a NEO model, as one frozen dataclass.

A `ModelConfig` comes from a published `config.json` (`from_hf`) or from `configs/models.py`.
Modules read it when they are built.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from neo_jax.errors import InputError

# Depth of the Qwen3 with these (hidden_size, intermediate_size), for configs without
# `extra_num_layers`: the other layers of a published depth are the Pre-Buffer.
QWEN3_DEPTH = {
    (1024, 3072): 28,
    (2048, 6144): 28,
    (2560, 9728): 36,
    (4096, 12288): 36,
    (5120, 17408): 40,
    (5120, 25600): 64,
}

QK_LAYOUTS = ("expanded", "expanded_merged_norm", "fused")

# Constants of the whole model family.
PATCH_SIZE = 16  # pixels
PATCH_CHANNELS = 3 * PATCH_SIZE**2  # C: numbers in one flattened patch
IMAGE_FACTOR = 2 * PATCH_SIZE  # pixels of a side of a visual token


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model. Names follow the published `config.json`."""

    hidden_size: int  # D
    intermediate_size: int  # F, width of the SwiGLU
    num_pre_buffer_layers: int
    num_post_llm_layers: int
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H, width of a value head; scores are scaled by 1/sqrt(head_dim)
    vocab_size: int  # V, rows of the embedding
    vision_hidden_size: int = 1024  # E, channels between the two convolutions
    rope_theta: float = 1e6  # base of the T axis
    rope_theta_hw: float = 1e4  # base of the H and W axes
    rope_theta_vision: float = 1e4  # base of the patch embedding's 2-D rotation
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # the head is the transposed embedding
    max_position_embeddings: int = 40960  # tokens: prompt and answer together
    min_pixels: int = 65536  # default bounds of an image's size
    max_pixels: int = 4194304
    qk_layout: str = "expanded"  # see QK_LAYOUTS and docs/architecture.md
    dtype: str = "bfloat16"  # matrix products; norms, angles, softmax, logits stay float32

    def __post_init__(self):
        _check_types(self)
        if self.qk_layout not in QK_LAYOUTS:
            raise InputError(f"qk_layout {self.qk_layout!r} is not one of {QK_LAYOUTS}")
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"dtype {self.dtype!r}: use 'float32' or 'bfloat16'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 8 or self.vision_hidden_size % 4:
            raise InputError(
                "head_dim must be a multiple of 8 and vision_hidden_size of 4, "
                "to rotate pairs of channels on two axes"
            )

    @property
    def num_layers(self) -> int:
        return self.num_pre_buffer_layers + self.num_post_llm_layers

    @property
    def t_width(self) -> int:
        """Channels of a query or key head that carry the T axis."""
        return self.head_dim // 2 if self.qk_layout == "fused" else self.head_dim

    @property
    def hw_width(self) -> int:
        """Channels of a query or key head that carry H and W, half each."""
        return self.t_width

    @property
    def qk_width(self) -> int:
        """J: channels of a query or key head, T and H and W together."""
        return self.t_width + self.hw_width

    @classmethod
    def from_hf(
        cls,
        hf: Mapping[str, Any],
        *,
        qk_layout: str = "expanded",
        tie_word_embeddings: bool | None = None,
        dtype: str = "bfloat16",
    ) -> "ModelConfig":
        """Reads a published `config.json`.

        Args:
          hf: the parsed file; one-element lists count as their element.
          qk_layout: which of QK_LAYOUTS the checkpoint's tensors have.
          tie_word_embeddings: whether the checkpoint lacks a head; default: what `hf` says.
          dtype: compute type.

        Raises:
          InputError: naming every field that is missing or not supported.
        """
        reader = _Reader(hf)
        hidden = reader.get("llm_config", "hidden_size")
        intermediate = reader.get("llm_config", "intermediate_size")
        depth = reader.get("llm_config", "num_hidden_layers")
        heads = reader.get("llm_config", "num_attention_heads")
        extra = reader.get("llm_config", "extra_num_layers", None)
        if extra is not None and type(extra) is not int:
            reader.problems.append(f"llm_config.extra_num_layers is {extra!r}: not a number")
            extra = None
        elif extra is None and None not in (hidden, intermediate, depth):
            if (hidden, intermediate) in QWEN3_DEPTH:
                extra = depth - QWEN3_DEPTH[hidden, intermediate]
            else:
                reader.problems.append(
                    "llm_config.extra_num_layers is missing and no Qwen3 has hidden_size "
                    f"{hidden} with intermediate_size {intermediate}: add the Pre-Buffer's depth"
                )
        if None not in (extra, depth) and not 0 <= extra <= depth:
            reader.problems.append(
                f"llm_config: a Pre-Buffer of {extra} of {depth} layers is not possible"
            )
        theta = reader.get("llm_config", "rope_theta", None)
        if theta is None:  # transformers 5 writes it one level down
            parameters = reader.get("llm_config", "rope_parameters", None)
            theta = parameters.get("rope_theta", 1e6) if isinstance(parameters, Mapping) else 1e6
        tied = reader.get("llm_config", "tie_word_embeddings", False)
        if tie_word_embeddings is not None:
            tied = tie_word_embeddings
        reader.expect("llm_config", "hidden_act", "silu")
        reader.expect("llm_config", "attention_bias", False)
        reader.expect("llm_config", "rope_scaling", None)
        reader.expect("llm_config", "use_sliding_window", False)
        reader.expect("llm_config", "num_experts", None)
        reader.expect("vision_config", "patch_size", PATCH_SIZE)
        reader.expect("vision_config", "num_channels", 3)
        reader.expect("vision_config", "downsample_ratio", 0.5)
        reader.expect("vision_config", "llm_hidden_size", hidden)
        fields = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_attention_heads": heads,
            "num_key_value_heads": reader.get("llm_config", "num_key_value_heads", heads),
            "head_dim": reader.get("llm_config", "head_dim", hidden and heads and hidden // heads),
            "vocab_size": reader.get("llm_config", "vocab_size"),
            "rope_theta_hw": reader.get("llm_config", "rope_theta_hw", 1e4),
            "rms_norm_eps": reader.get("llm_config", "rms_norm_eps", 1e-6),
            "max_position_embeddings": reader.get("llm_config", "max_position_embeddings", 40960),
            "vision_hidden_size": reader.get("vision_config", "hidden_size", 1024),
            "rope_theta_vision": reader.get("vision_config", "rope_theta_vision", 1e4),
            "min_pixels": reader.get("vision_config", "min_pixels", 65536),
            "max_pixels": reader.get("vision_config", "max_pixels", 4194304),
        }
        if reader.problems:
            raise InputError("config.json: " + "; ".join(reader.problems))
        return cls(
            num_pre_buffer_layers=extra,
            num_post_llm_layers=depth - extra,
            rope_theta=theta,
            tie_word_embeddings=bool(tied),
            qk_layout=qk_layout,
            dtype=dtype,
            **fields,
        )

    def to_hf(self, weights_dtype: str | None = None) -> dict[str, Any]:
        """A published `config.json` of this model, which the official PyTorch code reads."""
        dtype = weights_dtype or self.dtype
        llm = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "extra_num_layers": self.num_pre_buffer_layers,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "max_position_embeddings_hw": 10000,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_theta_hw": self.rope_theta_hw,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        vision = {
            "architectures": ["NEOVisionModel"],
            "model_type": "neo_vision",
            "downsample_ratio": 0.5,
            "hidden_size": self.vision_hidden_size,
            "llm_hidden_size": self.hidden_size,
            "max_pixels": self.max_pixels,
            "max_position_embeddings_vision": 10000,
            "min_pixels": self.min_pixels,
            "num_channels": 3,
            "patch_size": PATCH_SIZE,
            "rope_theta_vision": self.rope_theta_vision,
            "torch_dtype": dtype,
        }
        return {
            "architectures": ["NEOChatModel"],
            "auto_map": {
                "AutoConfig": "configuration_neo_chat.NEOChatConfig",
                "AutoModel": "modeling_neo_chat.NEOChatModel",
                "AutoModelForCausalLM": "modeling_neo_chat.NEOChatModel",
            },
            "model_type": "neo_chat",
            "template": "neo1_0",
            "downsample_ratio": 0.5,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": dtype,
            "llm_config": llm,
            "vision_config": vision,
        }


def _check_types(c: ModelConfig) -> None:
    problems = []
    for field in dataclasses.fields(c):
        value, kind = getattr(c, field.name), field.type
        least = 0 if field.name == "num_pre_buffer_layers" else 1
        is_valid = {
            int: type(value) is int and value >= least,
            float: type(value) in (int, float) and value > 0,
        }.get(kind, type(value) is kind)
        if not is_valid:
            wanted = {int: f"an integer, {least} or more", float: "a number above 0"}
            problems.append(f"{field.name} is {value!r}: use {wanted.get(kind, kind.__name__)}")
    if problems:
        raise InputError("; ".join(problems))


_REQUIRED = object()


class _Reader:
    """Reads fields of a published config and collects its problems."""

    def __init__(self, hf: Mapping[str, Any]):
        self.hf = hf
        self.problems: list[str] = []
        for section in ("llm_config", "vision_config"):
            if not isinstance(hf.get(section), Mapping):
                self.problems.append(f"no section {section!r}: is this a NEO checkpoint?")

    def get(self, section: str, name: str, default: Any = _REQUIRED) -> Any:
        fields = self.hf.get(section)
        if not isinstance(fields, Mapping):
            return None
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        is_number = default is _REQUIRED or type(default) in (int, float)
        if value is not None and is_number and type(value) not in (int, float):
            self.problems.append(f"{section}.{name} is {value!r}: not a number")
            return None
        if value is not None:
            return value
        if default is _REQUIRED:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f", did you mean {near[0]!r}" if near else ""
            self.problems.append(f"{section}.{name} is missing{hint}")
            return None
        return default

    def expect(self, section: str, name: str, wanted: Any) -> None:
        value = self.get(section, name, wanted)
        if value != wanted and not _is_default_rope(name, value):
            self.problems.append(f"{section}.{name} is {value!r}; only {wanted!r} is supported")


def _is_default_rope(name: str, value: Any) -> bool:
    """A `rope_scaling` that scales nothing, as some files spell it."""
    return (
        name == "rope_scaling"
        and isinstance(value, Mapping)
        and (value.get("rope_type", value.get("type")) in (None, "default"))
    )

"""Settings of a benchmark: sampling, image sizes, system prompt.

They come from the group and the preset, then the benchmark, then the command line.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import InputError
from neo_jax.infer.sampling import Sampling

REASON = "Reason step by step."


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides the answers besides the model and the dataset; a user may set any field."""

    preset: str = "greedy"
    system: str = REASON  # system prompt
    prefix: str = ""  # in front of every question; @FILE reads it from a file
    min_pixels: int = 1_310_720  # area of a resized image
    max_pixels: int = 16_777_216
    upscale: bool = False  # doubles the sides of the first image before it is resized
    num_frames: int = 0  # of a video; 0: `fps` a second
    fps: float = 1.0
    max_frames: int = 256
    spacing: str = "inside"  # of num_frames, see data/video.py
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 4096
    stop_on_repetition: bool = False  # ends an answer that repeats itself
    seed: int = 0  # combined with the number of a row

    def sampling(self, number: int) -> Sampling:
        """The sampling parameters of the row with this number."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return Sampling(**values | {"seed": (self.seed * 1_000_003 + number) % 2**32})


# Sampling of the published scores. The spatial ones are greedy, without a system prompt.
SAMPLED = {
    **{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05},
    "max_new_tokens": 16384,
}
GROUPS: dict[str, dict[str, Any]] = {
    "image": {},
    "video": {"min_pixels": 4096, "max_pixels": 230_400},
    "spatial": {"system": "", "min_pixels": 691_200, "max_pixels": 691_200},
}
PRESETS = ("greedy", "official")


def make_settings(
    group: str, preset: str, own: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Settings:
    """The settings of a benchmark.

    Args:
      group: "image", "video" or "spatial".
      preset: "greedy", which is deterministic, or "official", which samples where the published
        scores did.
      own: the benchmark's own values.
      overrides: "name=value" of any field.

    Raises:
      InputError: for an unknown preset or name, or a bad value.
    """
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}: use one of {', '.join(PRESETS)}")
    sampled = SAMPLED if preset == "official" and group != "spatial" else {}
    overridden = dict(_parse_override(override) for override in overrides)
    return Settings(**{"preset": preset, **GROUPS[group], **sampled, **own, **overridden})


def _parse_override(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    kinds = {k: v for k, v in typing.get_type_hints(Settings).items() if k != "preset"}
    if not equals or name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(kinds)}"
        raise InputError(f"{override!r}: write name=value; {hint}")
    kind = kinds[name]
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[text.lower()]
        if name == "prefix" and text[:1] == "@":
            return name, Path(text[1:]).read_text()
        return name, kind(text)
    except (ValueError, KeyError) as error:
        raise InputError(f"{name}: {text!r} is not {kind.__name__}") from error
    except OSError as error:
        raise InputError(f"{text[1:]}: cannot read: {error.strerror}") from error


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Differences between two nested mappings, as "name: was 3, now 4"."""
    found = []
    for name in dict.fromkeys((*before, *now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: was {old!r}, now {new!r}")
    return found

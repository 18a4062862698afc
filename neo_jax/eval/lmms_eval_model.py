"""NEO for lmms-eval: `lmms_eval --model neo_ov --model_args pretrained=DIR --tasks ...`.

Installed beside lmms-eval, this model replaces its own `neo_ov`, which needs CUDA. Its tasks run
unchanged, with the same prompts and settings, greedy unless a task samples. No other module
imports lmms-eval or this one. See docs/evaluation.md.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import neo_jax
from neo_jax import Request, Sampling
from neo_jax.data.chat import IMAGE_MARK
from neo_jax.errors import InputError


def manifest() -> ModelManifest:
    """The entry point `lmms_eval.models`."""
    path = f"{__name__}.{NeoJax.__name__}"
    return ModelManifest(model_id="neo_ov", chat_class_path=path, aliases=("neo_jax",))


class NeoJax(lmms):
    """NEO behind lmms-eval's model interface.

    Args:
      pretrained: a published directory or a checkpoint.
      dtype, weights: as of `neo_jax.load`.
      slots, max_length, pool_tokens, kv_dtype: as of `Engine`.
      min_pixels, max_pixels, system_prompt, max_new_tokens: for tasks that do not set them.
      **ignored: arguments that lmms-eval gives every model, such as a torch device.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        dtype: str = "bfloat16",
        weights: str | None = None,
        slots: int | None = None,
        max_length: int | None = None,
        pool_tokens: int | None = None,
        kv_dtype: str | None = None,
        min_pixels: int = 65536,
        max_pixels: int = 4194304,
        system_prompt: str = "Reason step by step.",
        max_new_tokens: int = 4096,
        **ignored: Any,
    ):
        super().__init__()
        known = {"batch_size", "max_batch_size", "device", "device_map", "torch_dtype"}
        if unknown := ignored.keys() - known:
            raise InputError(f"model_args {', '.join(sorted(unknown))}: there are no such settings")
        self._neo = neo_jax.load(pretrained, dtype=dtype, weights=weights)
        sizes = {"slots": slots, "max_length": max_length, "pool_tokens": pool_tokens}
        self._engine = {name: size and int(size) for name, size in sizes.items()}
        self._engine |= {"kv_dtype": kv_dtype}
        self._system = system_prompt
        self._defaults = {
            "min_pixels": int(min_pixels),
            "max_pixels": int(max_pixels),
            "max_new_tokens": int(max_new_tokens),
        }

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers all requests together; returns the answers in their order."""
        found: list[GenerationResult | None] = [None] * len(requests)
        neo_requests = (self._request(number, one) for number, one in enumerate(requests))
        results = self._neo.serve(neo_requests, **self._engine)
        for number, result in tqdm(results, total=len(requests), desc="neo_jax"):
            context, _, options, *_ = requests[number].args
            if result.error:
                warnings.warn(f"request {number}: {result.error}", stacklevel=2)
            text = _without_reasoning(result.text) if options.get("remove_think") else result.text
            count = result.usage.get("completion_tokens", 0)
            found[number] = GenerationResult(text, TokenCounts(output_tokens=count))
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return found

    def _request(self, number: int, instance: Instance) -> Request:
        _, to_messages, options, doc_id, task, split = instance.args
        document = self.task_dict[task][split][doc_id]
        return self._to_request(ChatMessages(messages=to_messages(document)), options, number)

    def _to_request(
        self, conversation: ChatMessages, options: Mapping[str, Any], number: int
    ) -> Request:
        system, prompt, images, videos = self._system, "", [], []
        for message in conversation.messages:
            texts = [part.text for part in message.content if part.type == "text"]
            if message.role == "system":
                system = "\n".join(texts).strip() or system
                continue
            for part in message.content:
                if part.type == "text":
                    prompt += part.text
                elif part.type == "image":
                    prompt += f"{IMAGE_MARK}\n"
                    images.append(part.url)
                elif part.type == "video":
                    videos.append(part.url)
                else:
                    raise InputError(f"a message has {part.type}: NEO takes text, images and video")
        if len(videos) > 1:
            raise InputError(f"{len(videos)} videos in one question: give one")
        is_upscaled = str(options.get("upscale", False)).lower() == "true"
        return Request(
            prompt=prompt.strip(),
            images=images,
            video=videos[0] if videos else None,
            system=str(options.get("system_prompt", system)).replace("\\n", "\n"),
            min_pixels=int(float(self._option("min_pixels", options))),
            max_pixels=int(float(self._option("max_pixels", options))),
            num_upscaled=len(images) * is_upscaled,
            sampling=self._sampling(options, number),
        )

    def _option(self, name: str, options: Mapping[str, Any]) -> Any:
        return options.get(name, self._defaults[name])

    def _sampling(self, options: Mapping[str, Any], number: int) -> Sampling:
        chosen = {"max_new_tokens": int(self._option("max_new_tokens", options)), "seed": number}
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        given = {name: options[name] for name in names if options.get(name) is not None}
        if not options.get("do_sample"):
            given = {"repetition_penalty": given.get("repetition_penalty", 1.0)}
        elif "temperature" not in given:
            given["temperature"] = 1.0
        return Sampling(**chosen, **given)

    def loglikelihood(self, requests: Sequence[Instance]) -> list:
        raise NotImplementedError("neo_jax answers in words: use generate_until tasks")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Iterator:
        raise NotImplementedError("neo_jax answers once: use generate_until tasks")


def _without_reasoning(text: str) -> str:
    return re.sub(r"<(think|thinking)>.*?</\1>", "", text, flags=re.S | re.I).strip()

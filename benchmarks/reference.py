"""The official PyTorch model, answering requests of ours: what `benchmarks.infer` compares with."""

import contextlib
import dataclasses
import importlib
import sys
import time
import types
from pathlib import Path

import numpy as np

from neo_jax import InputError, Pipeline, Request, preprocess_image
from neo_jax.data.chat import chat_prompt, expand_images


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of some requests."""

    seconds: float
    prompt_tokens: int
    token_ids: list[list[int]]  # of each request
    times: list[list[float]]  # in seconds from the start, when they came

    @property
    def seconds_per_prompt_token(self) -> float:
        return self.seconds / self.prompt_tokens

    @property
    def seconds_per_new_token(self) -> float:
        """Counted from when all had their first token, so without prefill."""
        began = max(times[0] for times in self.times)
        later = [at for times in self.times for at in times if at > began]
        return (max(later) - began) / len(later)


def model_inputs(neo: Pipeline, request: Request) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids, pixel values and grids of a request about images."""
    c, images = neo.config, request.images
    cut = [preprocess_image(image, c.min_pixels, c.max_pixels) for image in images]
    pixels, grids = (np.concatenate(arrays) for arrays in zip(*cut, strict=True))
    prompt = expand_images(chat_prompt(request.prompt, num_images=len(images)), grids)
    return neo.tokenizer.encode(prompt), pixels, grids


class Official:
    """The official model, greedy, one request at a time, which is all that it can.

    Args:
      kit: the official VLMEvalKit.
      model: directory as published.
      neo: the same checkpoint, loaded by us: it prepares the inputs.
    """

    def __init__(self, kit: Path, model: Path, neo: Pipeline, threads: int):
        folder = code_folder(kit)
        if not (model / "config.json").is_file():
            raise InputError(f"{model}: no config.json there, which the official code reads")
        try:
            import torch
            import transformers
        except ImportError as error:
            raise InputError(f"the official code needs torch and transformers: {error}") from error
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        # The package around the model imports the whole toolkit; only to_hf is wanted.
        package = types.ModuleType("official")
        package.__path__ = [str(folder)]
        sys.modules["official"] = package
        with contextlib.redirect_stdout(None):  # it complains of its own docstrings
            chat = importlib.import_module("official.modeling_neo_chat")
        self._torch, self._neo, self._dtype = torch, neo, getattr(torch, neo.config.dtype)
        self._model = chat.NEOChatModel.from_pretrained(model, torch_dtype=self._dtype).eval()
        self._model.img_context_token_id = neo.tokenizer.image_context_id
        self._model.img_start_token_id = neo.tokenizer.image_start_id
        self._model.language_model.generation_config.eos_token_id = None  # no early end
        self.name = f"official: torch {torch.__version__}, transformers {transformers.__version__}"

    def run(self, requests: list[Request]) -> Run:
        inputs = [model_inputs(self._neo, request) for request in requests]
        streams, start = [], time.perf_counter()
        for request, (ids, pixels, grids) in zip(requests, inputs, strict=True):
            streams.append(_Stream(start))
            ids = self._torch.tensor([ids])
            self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                pixel_values=self._torch.tensor(pixels).to(self._dtype),
                grid_hw=self._torch.tensor(grids).long(),
                max_new_tokens=request.sampling.max_new_tokens,
                do_sample=False,
                streamer=streams[-1],
            )
        return Run(
            time.perf_counter() - start,
            sum(len(ids) for ids, _, _ in inputs),
            [stream.token_ids for stream in streams],
            [stream.times for stream in streams],
        )


def code_folder(kit: Path) -> Path:
    """Where in VLMEvalKit the model's code is."""
    folder = kit / "vlmeval/vlm/neo/to_hf"
    if not (folder / "modeling_neo_chat.py").is_file():
        raise InputError(f"{kit}: no vlmeval/vlm/neo/to_hf there: not the official VLMEvalKit")
    return folder


class _Stream:
    """Takes tokens from Transformers as they come; what it hands over first is the prompt."""

    def __init__(self, start: float):
        self.token_ids, self.times, self._start, self._is_prompt = [], [], start, True

    def put(self, tokens) -> None:
        if not self._is_prompt:
            self.token_ids.append(int(tokens))
            self.times.append(time.perf_counter() - self._start)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is kept back."""

"""Computes the logits of the official PyTorch model for an exported directory.

test_convert.py runs this in a process of its own, since it needs torch:

python official_logits.py VLMEvalKit DIR inputs.npz logits.npy
"""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch


def main(official: str, directory: str, inputs: str, saved: str) -> None:
    # The package around the model imports the whole toolkit, so only its folder to_hf is imported.
    folder = Path(official) / "vlmeval/vlm/neo/to_hf"
    package = types.ModuleType("official")
    package.__path__ = [str(folder)]
    sys.modules["official"] = package
    chat = importlib.import_module("official.modeling_neo_chat")
    model, loading = chat.NEOChatModel.from_pretrained(
        directory, torch_dtype=torch.float32, output_loading_info=True
    )
    tied = {"language_model.lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not set(loading["missing_keys"]) - tied, loading["missing_keys"]
    assert not loading["unexpected_keys"], loading["unexpected_keys"]
    assert not loading["mismatched_keys"], loading["mismatched_keys"]
    model.eval()
    case = np.load(inputs)
    ids = torch.tensor(case["input_ids"].astype(np.int64))[None]
    language = model.language_model
    embeds = language.get_input_embeddings()(ids)
    with torch.no_grad():
        if "pixel_values" in case:
            grid_hw = torch.tensor(case["grid_hw"].astype(np.int64))
            visual = model.extract_feature(torch.tensor(case["pixel_values"]), grid_hw=grid_hw)
            context = ids[0] == int(np.bincount(case["input_ids"]).argmax())
            assert int(context.sum()) == len(visual)
            embeds[0, context] = visual
        from transformers import DynamicCache

        length = ids.shape[1]
        logits = language(
            inputs_embeds=embeds,
            indexes=torch.tensor(case["indexes"].astype(np.int64)),
            past_key_values=DynamicCache(),
            cache_position=torch.arange(length),
            position_ids=torch.arange(length)[None],
            use_cache=True,
        ).logits
    np.save(saved, logits[0].numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The model for lmms-eval answers like our own evaluation.

Where lmms-eval is not installed, stubs stand for the names that the module uses.
"""

import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from typing import NamedTuple

import pytest

import neo_jax
from helpers import made_benchmarks as made
from helpers.golden import GOLDEN, load_case, raises
from neo_jax.data.image import open_rgb
from neo_jax.eval import prompts
from neo_jax.eval.run import Plan, evaluate

SETTINGS = {"max_new_tokens": 4, "min_pixels": 1024, "max_pixels": 4096}


class Part(NamedTuple):
    type: str
    text: str = ""
    url: object = None


class Message(NamedTuple):
    role: str
    content: list


class Conversation:
    def __init__(self, messages):
        self.messages = [
            Message(m["role"], [Part(**part) for part in m["content"]]) for m in messages
        ]


class Model:
    def __init__(self):
        self.task_dict = {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *arguments: None)


@dataclasses.dataclass
class Counted:
    output_tokens: int


@dataclasses.dataclass
class Generated:
    text: str
    token_counts: Counted


@pytest.fixture(scope="module")
def adapter():
    """The module, with lmms-eval's own classes if it is installed."""
    stubs = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {
            **{"GenerationResult": Generated, "Instance": object, "TokenCounts": Counted},
        },
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": types.SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": Conversation},
    }
    patch = pytest.MonkeyPatch()
    if importlib.util.find_spec("lmms_eval") is None:
        for name, members in stubs.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
    neo = load_case("generate")
    patch.setattr(neo_jax, "load", lambda path, dtype, weights: neo)
    yield importlib.import_module("neo_jax.eval.lmms_eval_model")
    patch.undo()
    sys.modules.pop("neo_jax.eval.lmms_eval_model", None)


def instances(model, rows, **options):
    """The requests that lmms-eval makes of rows: an image, then the question."""

    def messages(row):
        text, _ = prompts.choice(row, 1)
        content = [{"type": "image", "url": row["image"]}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    model.task_dict = {"toy": {"test": rows}}
    options = {"do_sample": False, "temperature": 0, "until": ["\n"], **SETTINGS, **options}
    return [
        types.SimpleNamespace(args=("", messages, options, n, "toy", "test"))
        for n in range(len(rows))
    ]


@pytest.mark.slow
def test_answers_are_those_of_our_runner(adapter, tmp_path):
    made.write_tsv(tmp_path, rows=12)
    overrides = [f"{name}={value}" for name, value in SETTINGS.items()]
    neo = load_case("generate")

    def serve(requests):
        return neo.serve(requests, slots=4, max_length=512)

    evaluate(Plan("mmstar", tmp_path, tmp_path / "run", overrides=overrides), {}, serve)
    lines = (tmp_path / "run/mmstar/predictions.jsonl").read_text().splitlines()
    found = {line["meta"]["index"]: line for line in map(json.loads, lines)}
    rows = [
        {
            **{"question": f'What is "it" in {n}?\nLook\tclosely.', **made.options(n)},
            "image": open_rgb(made.encoded(n)),
        }
        for n in range(12)
    ]
    model = adapter.NeoJax(str(GOLDEN / "generate/hf"), slots=4, max_length=512, batch_size=1)
    answers = model.generate_until(instances(model, rows))
    assert [one.text for one in answers] == [found[str(n)]["text"] for n in range(12)]
    assert len({one.text for one in answers}) > 3
    assert {one.token_counts.output_tokens for one in answers} == {4}


def test_settings_of_tasks_reach_the_request(adapter):
    model = adapter.NeoJax("x", slots=2, system_prompt="S", device="cuda:0")
    image = open_rgb(made.encoded(1))
    rows = [{"question": "Q", "A": "a", "image": image}]
    (greedy,) = instances(model, rows, temperature=0.7, top_k=5)
    request = model._request(0, greedy)
    assert request.prompt.startswith("<image>\nQ\nA. a\n")
    assert (request.system, request.min_pixels, request.num_upscaled) == ("S", 1024, 0)
    assert (request.sampling.temperature, request.sampling.top_k) == (0, 0)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 5, "upscale": "true"}
    (sampled,) = instances(model, rows, system_prompt="", **options)
    request = model._request(0, sampled)
    assert (request.system, request.num_upscaled) == ("", 1)
    assert (request.sampling.temperature, request.sampling.top_k) == (0.7, 5)
    with raises("model_args bach_size: there are no such settings"):
        adapter.NeoJax("x", bach_size=1)
    assert adapter.manifest().model_id == "neo_ov"
    assert adapter.manifest().chat_class_path == "neo_jax.eval.lmms_eval_model.NeoJax"

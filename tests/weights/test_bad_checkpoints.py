"""Mistakes with a checkpoint or its loading: one error that names the cause."""

import json
import shutil

import jax
import pytest

import neo_jax
from helpers.golden import GOLDEN, load_case, raises

SOURCE = GOLDEN / "generate/hf"


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("llm_config", "hidden_size", "48", "llm_config.hidden_size is '48': not a number"),
        ("llm_config", "num_hidden_layers", [1, 2], "num_hidden_layers is .*not a number"),
        ("llm_config", "extra_num_layers", "one", "extra_num_layers is 'one'"),
        ("llm_config", "vocab_size", 0, "vocab_size is 0: use an integer, 1 or more"),
        ("llm_config", "rms_norm_eps", -1.0, "rms_norm_eps is -1.0: use a number above 0"),
        ("vision_config", "hidden_size", 32.5, "vision_hidden_size is 32.5: use an integer"),
    ],
)
def test_values_of_a_config_are_checked(section, name, value, message, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "hf")
    content = json.loads((SOURCE / "config.json").read_text())
    content[section][name] = value
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    with raises(message):
        neo_jax.load(tmp_path / "hf")


def test_an_index_names_only_files_beside_it(tmp_path):
    source = GOLDEN / "multi_image/hf"
    shutil.copytree(source, tmp_path / "hf")
    index = next((tmp_path / "hf").glob("*.index.json"))
    content = json.loads(index.read_text())
    key = next(iter(content["weight_map"]))
    content["weight_map"][key] = "../other/model.safetensors"
    index.write_text(json.dumps(content))
    with raises("'../other/model.safetensors' is not the name of a file beside it"):
        neo_jax.load(tmp_path / "hf")


def test_a_mesh_of_other_axes_is_refused():
    for mesh in (
        jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]),
        jax.make_mesh(
            (1, 1, 1),
            ("data", "fsdp", "tensor"),
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
            devices=jax.devices()[:1],
        ),
    ):
        with raises("a mesh of Explicit axes"):
            neo_jax.load(SOURCE, mesh=mesh)


def test_one_picture_need_not_be_in_a_list():
    neo, image = load_case("generate"), GOLDEN / "generate/images/image_0.png"
    options = {"max_new_tokens": 4, "max_pixels": 16384, "min_pixels": 4096}
    wanted = neo.chat("What is this?", images=[image], **options)
    assert neo.chat("What is this?", images=str(image), **options) == wanted
    assert neo.chat("What is this?", images=image, **options) == wanted
    assert neo.chat("Hi", images=None, **options) == neo.chat("Hi", **options)

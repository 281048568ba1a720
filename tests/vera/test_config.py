"""VeraConfig: every example of its page works, and what cannot be is refused by name when it is made."""

import json
import warnings

import pytest

from tests.models import tiny_llama, tiny_opt
from vblora_triton import PeftConfig, PeftType, VeraConfig, get_peft_model

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# The page's examples, with what each adapts in a Llama of two layers.
EXAMPLES = {
    "basic": ({"r": 256, "target_modules": ["q_proj", "v_proj"], "vera_dropout": 0.1, "d_initial": 0.1}, 4),
    "full": ({"r": 128, "target_modules": ATTENTION_AND_MLP, "vera_dropout": 0.05, "bias": "none"}, 14),
    "some layers": (
        {
            "r": 256,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": [0, 2, 4, 6, 8, 10],
            "layers_pattern": "layers",
        },
        2,
    ),
    "light": (
        {"r": 256, "target_modules": ["q_proj", "v_proj"], "save_projection": False, "projection_prng_key": 42},
        4,
    ),
    "head": (
        {"r": 256, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "bias": "vera_only"},
        4,
    ),
}


@pytest.mark.filterwarnings("ignore:`save_projection` is False")
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_adapts_what_it_names(name):
    fields, layers = EXAMPLES[name]
    model = get_peft_model(tiny_llama(), VeraConfig(**fields))
    assert len(model.targeted_module_names) == layers
    layer = model.get_submodule(f"base_model.model.{model.targeted_module_names[0]}")
    assert layer.vera_lambda_d["default"].shape == (fields["r"],)
    dropout = layer.vera_dropout["default"]
    assert getattr(dropout, "p", 0.0) == fields.get("vera_dropout", 0.0)


def test_the_integration_example_trains_only_its_scales():
    config = VeraConfig(r=256, target_modules=["q_proj", "v_proj"], vera_dropout=0.1)
    model = get_peft_model(tiny_opt(), config)
    # Two layers, q and v: r and the 32 outputs each.
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * (256 + 32)


def test_defaults_are_those_of_the_page():
    config = VeraConfig()
    expected = {
        "r": 256,
        "target_modules": None,
        "exclude_modules": None,
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.0,
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
        "init_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "peft_type": PeftType.VERA,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert VeraConfig(target_modules=["q", "v", "q"]).target_modules == {"q", "v"}


def test_the_stored_example_is_read_and_written_back(tmp_path):
    stored = {
        "peft_type": "VERA",
        "r": 256,
        "target_modules": ["q_proj", "v_proj"],
        "projection_prng_key": 0,
        "save_projection": True,
        "vera_dropout": 0.1,
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "bias": "none",
        "modules_to_save": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, VeraConfig)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert {name: written[name] for name in stored} == stored


def test_leaving_projections_out_warns_whoever_asks_for_it_at_his_line_and_nobody_who_reads_it(tmp_path):
    with pytest.warns(UserWarning, match="`save_projection` is False") as caught:
        config = VeraConfig(save_projection=False)
    assert caught[0].filename == __file__
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path).save_projection is False
        assert VeraConfig().save_projection is True
    with pytest.warns(UserWarning, match="`save_projection` is False"):
        VeraConfig(save_projection=False)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"r": 0}, ValueError, ["`r`", "0", "at least 1"]),
        ({"r": True}, TypeError, ["`r`", "True"]),
        ({"r": 4.0}, TypeError, ["`r`", "4.0"]),
        ({"projection_prng_key": -1}, ValueError, ["`projection_prng_key`", "-1", "at least 0"]),
        ({"projection_prng_key": None}, TypeError, ["`projection_prng_key`", "None"]),
        ({"projection_prng_key": 2**64}, ValueError, ["`projection_prng_key`", "below 2**64"]),
        ({"save_projection": "no"}, TypeError, ["`save_projection`", "'no'", "True or False"]),
        ({"init_weights": None}, TypeError, ["`init_weights`", "None"]),
        ({"fan_in_fan_out": 1}, TypeError, ["`fan_in_fan_out`", "1"]),
        ({"vera_dropout": 1.5}, ValueError, ["`vera_dropout`", "1.5"]),
        ({"vera_dropout": float("nan")}, ValueError, ["`vera_dropout`", "nan"]),
        ({"d_initial": 0}, ValueError, ["`d_initial`", "0.1"]),
        ({"d_initial": float("inf")}, ValueError, ["`d_initial`", "inf"]),
        ({"d_initial": "0.1"}, TypeError, ["`d_initial`"]),
        ({"bias": "lora_only"}, ValueError, ["`bias`", "'lora_only'", "'vera_only'"]),
        ({"peft_type": "VBLORA"}, ValueError, ["`peft_type`", "'VBLORA'", "'VERA'"]),
        ({"target_modules": 3}, TypeError, ["`target_modules`", "3"]),
        ({"exclude_modules": "[q"}, ValueError, ["`exclude_modules`"]),
        ({"modules_to_save": "head"}, TypeError, ["`modules_to_save`", "'head'"]),
        ({"layers_pattern": "layers"}, ValueError, ["`layers_pattern`", "`layers_to_transform`"]),
    ],
    ids=str,
)
def test_a_bad_field_is_refused_by_name(fields, error, words):
    with pytest.raises(error) as caught:
        VeraConfig(**fields)
    for word in words:
        assert word in str(caught.value)


def test_the_ends_of_the_ranges_are_inside():
    config = VeraConfig(r=1, projection_prng_key=2**64 - 1, vera_dropout=1.0, d_initial=-0.5)
    assert (config.r, config.vera_dropout, config.d_initial) == (1, 1.0, -0.5)
    assert VeraConfig(d_initial=0.0, init_weights=False).d_initial == 0.0

"""The import paths of the pages, word for word, with vblora_triton for peft."""

import re
from importlib import import_module

import pytest

PATHS = """
from vblora_triton.tuners.vblora.layer import VBLoRALayer, Linear
from vblora_triton.tuners.vblora.model import VBLoRAModel
from vblora_triton.tuners.vblora.config import VBLoRAConfig
from vblora_triton.tuners.vera.config import VeraConfig
from vblora_triton.tuners.vera.model import VeraModel
from vblora_triton.tuners.vera.layer import VeraLayer, Linear
from vblora_triton.tuners.vblora import Linear, VBLoRAConfig, VBLoRALayer, VBLoRAModel
from vblora_triton.tuners.vera import Linear, VeraConfig, VeraLayer, VeraModel
from vblora_triton.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from vblora_triton.tuners import VBLoRAConfig, VBLoRAModel, VeraConfig, VeraModel
from vblora_triton import get_peft_model, VBLoRAConfig, VeraConfig, PeftModel, AutoPeftModel
from vblora_triton import load_peft_weights, cast_mixed_precision_params, prepare_model_for_kbit_training
from vblora_triton import get_peft_config, PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftWarning
from vblora_triton import convert_to_lora, inject_adapter_in_model, get_base_model_state_dict
"""


@pytest.mark.parametrize("line", PATHS.strip().splitlines())
def test_import_paths_answer_with_the_same_classes(line):
    names: dict = {}
    exec(line, names)
    path, wanted = re.fullmatch(r"from (\S+) import (.*)", line).groups()
    for name in wanted.split(", "):
        value = names[name]
        assert value is getattr(import_module(path), name)
        if isinstance(value, type):
            assert value is getattr(import_module(value.__module__), name), "one class, under all of its names"

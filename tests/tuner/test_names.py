"""What a base model has under its own names is found under them on the adapted model."""

import re
from pathlib import Path

import pytest
import transformers
from transformers import GPT2Model, LlamaModel

from tests.models import tiny_gpt2, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model

peft = pytest.importorskip("peft")

FIELDS = {"r": 2, "target_modules": ["q_proj"]}
METHODS = {"vblora": (VBLoRAConfig, FIELDS | {"num_vectors": 10, "vector_length": 16}), "vera": (VeraConfig, FIELDS)}


def names_of_base_models() -> set[str]:
    """Every public attribute and method that any modelling file of transformers defines in a class."""
    names = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"^        self\.([a-z]\w*)(?:: [^=\n]+)? = ", text, re.MULTILINE))
        names |= set(re.findall(r"^    (?:async )?def ([a-z]\w*)\(", text, re.MULTILINE))
    assert {"layers", "h", "embed_tokens", "lm_head", "prepare_inputs_for_generation"} <= names
    return names


@pytest.mark.parametrize("method", METHODS)
def test_no_public_name_of_ours_hides_one_of_a_base_model(method):
    config_class, fields = METHODS[method]
    ours = get_peft_model(tiny_llama(), config_class(**fields))
    theirs = peft.get_peft_model(tiny_llama(), getattr(peft, config_class.__name__)(**fields))
    names = names_of_base_models()
    for own, control in ((ours, theirs), (ours.base_model, theirs.base_model)):
        classes = [kind for kind in type(own).__mro__ if kind.__module__.startswith("vblora_triton")]
        defined = {name for kind in classes for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
        public = {name for name in defined | {*vars(own), *own._modules} if not name.startswith("_")}
        assert "peft_config" in public
        # What PEFT has by the same name is expected there.
        assert not sorted((public & names) - set(dir(control)))


@pytest.mark.parametrize("method", METHODS)
def test_a_models_own_layers_are_reached_through_the_adapted_model(method):
    config_class, fields = METHODS[method]
    base = LlamaModel(tiny_llama().config)
    model = get_peft_model(base, config_class(**fields))
    assert model.layers is model.base_model.layers is base.layers
    assert model.layers[0].self_attn.q_proj.r == {"default": 2}
    gpt2 = GPT2Model(tiny_gpt2().config)
    assert get_peft_model(gpt2, config_class(**fields | {"target_modules": ["c_attn"]})).h is gpt2.h

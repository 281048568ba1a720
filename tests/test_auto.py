"""AutoPeftModel and its kin: which base model they load, and what they refuse to load."""

import json
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

import vblora_triton
from tests.models import VOCABULARY, enlarge, outputs, tiny_bert, tiny_llama
from vblora_triton import (
    AdapterFileError,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    TaskType,
    VBLoRAConfig,
    get_peft_model,
)
from vblora_triton.task_models import TASK_CLASSES

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16}


@pytest.fixture
def base(tmp_path):
    """A function that saves a base model and reads it back, so that it knows where it came from."""

    def save_and_read(make, kind):
        make().save_pretrained(tmp_path / "base")
        return kind.from_pretrained(tmp_path / "base").eval()

    return save_and_read


def saved(model, folder, **changes) -> PeftModel:
    fields = {"target_modules": ["q_proj"]} | FIELDS | changes
    adapted = enlarge(get_peft_model(model, VBLoRAConfig(**fields))).eval()
    adapted.save_pretrained(folder)
    return adapted


def rewrite(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("only_topk", [False, True], ids=["full", "topk"])
def test_a_model_without_a_task_comes_back_in_its_own_class(only_topk, base, tmp_path):
    model = saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter", save_only_topk_weights=only_topk)
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(again) is PeftModel
    assert type(again.get_base_model()) is LlamaForCausalLM
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6 if only_topk else 0)
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("kind", [AutoPeftModel, AutoPeftModelForCausalLM])
def test_a_task_chooses_the_class(kind, base, tmp_path):
    model = saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter", task_type="CAUSAL_LM")
    again = kind.from_pretrained(tmp_path / "adapter", adapter_name="mine", is_trainable=True)
    assert type(again) is vblora_triton.PeftModelForCausalLM
    assert again.active_adapter == "mine"
    assert any(p.requires_grad for p in again.parameters())
    assert torch.equal(outputs(again.eval()), outputs(model))


def test_a_classifier_comes_back_with_its_head(base, tmp_path):
    plain = base(tiny_bert, type(tiny_bert()))
    model = saved(plain, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(outputs(again), outputs(model))


def test_every_task_has_its_class():
    for task in TaskType:
        kind = getattr(vblora_triton, f"Auto{TASK_CLASSES[task].__name__}")
        assert issubclass(kind, AutoPeftModel)
        assert kind._peft_class is TASK_CLASSES[task]


def test_options_of_the_base_model_and_of_the_adapter_reach_each(base, tmp_path):
    model = saved(base(tiny_llama, LlamaModel), tmp_path / "adapter" / "inner", task_type="FEATURE_EXTRACTION")
    assert model.active_peft_config.base_model_name_or_path
    again = AutoPeftModelForFeatureExtraction.from_pretrained(
        tmp_path / "adapter", subfolder="inner", autocast_adapter_dtype=False, dtype=torch.bfloat16
    )
    assert type(again.get_base_model()) is LlamaModel
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_a_larger_tokenizer_widens_the_embedding(base, tmp_path):
    saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter", task_type="CAUSAL_LM")
    words = {f"word{n}": n for n in range(VOCABULARY + 3)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")))
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.get_input_embeddings().weight.shape[0] == VOCABULARY + 3


TOKENIZER_CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

class Custom(PreTrainedTokenizerFast):
    pass

Path({mark!r}).touch()
"""
CONFIG_CODE = """
from pathlib import Path
from transformers import LlamaConfig

class Custom(LlamaConfig):
    model_type = "of_mine"

Path({mark!r}).touch()
"""
MODEL_CODE = """
from transformers import LlamaForCausalLM
from .configuration import Custom

class CustomForCausalLM(LlamaForCausalLM):
    config_class = Custom
"""


@pytest.fixture
def answers_yes(monkeypatch, tmp_path):
    """Someone who lets every question through; returns the questions."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    # Where transformers keeps the code that it was allowed to run.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return asked


def with_tokenizer_code(folder):
    """Give a folder a tokenizer with code of its own; returns the file that appears when it runs."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"word": 0}, unk_token="word")))
    tokenizer.save_pretrained(folder)
    path, mark = folder / "tokenizer_config.json", folder / "tokenizer_ran"
    own = {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "tokenization.Custom"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "tokenization.py").write_text(TOKENIZER_CODE.format(mark=str(mark)))
    return mark


@pytest.mark.parametrize("kind", [AutoPeftModel, AutoPeftModelForCausalLM])
@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}], ids=["default", "distrusted"])
def test_a_tokenizers_code_is_neither_run_nor_asked_about(options, kind, base, tmp_path, answers_yes):
    saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter", task_type="CAUSAL_LM")
    mark = with_tokenizer_code(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trust_remote_code"):
        kind.from_pretrained(tmp_path / "adapter", **options)
    assert not answers_yes
    assert not mark.exists()
    assert kind.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert mark.exists()
    assert not answers_yes


def test_a_base_models_code_is_neither_run_nor_asked_about_where_it_is_distrusted(base, tmp_path, answers_yes):
    saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter", task_type="CAUSAL_LM")
    folder, mark = tmp_path / "base", tmp_path / "base_ran"
    (folder / "configuration.py").write_text(CONFIG_CODE.format(mark=str(mark)))
    (folder / "modeling.py").write_text(MODEL_CODE)
    own = {"AutoConfig": "configuration.Custom", "AutoModelForCausalLM": "modeling.CustomForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "of_mine", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=False)
    assert not answers_yes
    assert not mark.exists()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert type(model.get_base_model()).__name__ == "CustomForCausalLM"


def test_a_file_cannot_choose_what_is_imported(base, tmp_path):
    saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", auto_mapping={"parent_library": "antigravity", "base_model_class": "Fly"})
    with pytest.raises(ValueError, match=r"antigravity.*import_allowlist"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert "antigravity" not in sys.modules
    mapping = {"parent_library": "transformers_of_mine", "base_model_class": "Fly"}
    rewrite(tmp_path / "adapter", auto_mapping=mapping)
    with pytest.raises(ValueError, match="transformers_of_mine"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    rewrite(
        tmp_path / "adapter", auto_mapping={"parent_library": "tests.models", "base_model_class": "LlamaForCausalLM"}
    )
    assert AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["tests"])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"task_type": "SEQ_CLS"}, AutoPeftModelForCausalLM, ["SEQ_CLS", "AutoPeftModelForSequenceClassification"]),
        ({"auto_mapping": None}, AutoPeftModel, ["auto_mapping", "PeftModel.from_pretrained"]),
        ({"auto_mapping": {"parent_library": 3}}, AutoPeftModel, ["auto_mapping"]),
        (
            {"auto_mapping": {"parent_library": "transformers", "base_model_class": "is_torch_available"}},
            AutoPeftModel,
            ["is_torch_available", "no model class"],
        ),
        ({"base_model_name_or_path": None}, AutoPeftModel, ["base_model_name_or_path"]),
    ],
)
def test_what_cannot_be_loaded_is_said_by_name(changes, kind, words, base, tmp_path):
    saved(base(tiny_llama, LlamaForCausalLM), tmp_path / "adapter")
    rewrite(tmp_path / "adapter", **changes)
    with pytest.raises(ValueError, match=words[0]) as caught:
        kind.from_pretrained(tmp_path / "adapter")
    assert all(word in str(caught.value) for word in words)


def test_an_auto_class_is_not_made():
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM\.from_pretrained"):
        AutoPeftModelForCausalLM("adapter")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json"):
        AutoPeftModel.from_pretrained(tmp_path)

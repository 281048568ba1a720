"""The model card: what the Hub reads of it, and what becomes of one that is there."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import vblora_triton
from tests.models import tiny_llama
from vblora_triton import PeftModel, TaskType, VBLoRAConfig, get_peft_model
from vblora_triton.card import model_card, update_model_card

CONFIG = VBLoRAConfig(base_model_name_or_path="someone/base: a 'quoted' one")


def test_the_hub_reads_the_metadata():
    data = ModelCard(model_card(CONFIG)).data
    assert data.base_model == CONFIG.base_model_name_or_path
    assert data.library_name == "peft"
    assert data.tags == ["vblora-triton", "vblora"]
    assert ModelCard(model_card(VBLoRAConfig())).data.base_model is None


def test_a_card_that_is_there_keeps_its_text_and_gains_the_metadata(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n- vblora\n---\n# Title\n\nMy words.\n")
    update_model_card(tmp_path, CONFIG)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == CONFIG.base_model_name_or_path
    assert card.data.tags == ["mine", "vblora", "vblora-triton"]
    assert "# Title\n\nMy words.\n" in card.text
    (tmp_path / "README.md").write_text("no metadata")
    update_model_card(tmp_path, CONFIG)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
    assert "no metadata" in (tmp_path / "README.md").read_text()


def test_trainers_card_of_an_adapter_is_completed(tmp_path):
    model = get_peft_model(tiny_llama(), VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"]))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=arguments)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert {"vblora", "vblora-triton"} <= set(card.data.tags)


@pytest.mark.parametrize(
    "name",
    [
        'a"b', "a'b", "a\\b", "a\nb", "a\n---\nb", "a\r\n---\r\nlicense: mit", 'a"\nlicense: "mit', "\0", "a\x07b",
        "a\x85b", "a\u2028b", "\ufeffx", "null", "yes", "1e3", "2020-01-01", "- a", "#x", "a: b", "a #b", "{a}", "&a",
        "!!set x", "|", " a ", "\x1b[31m", "\n---\n# Title", "`; rm -rf`", "é漢🙂", "long " * 60,
    ],
)  # fmt: skip
def test_no_name_of_a_base_model_breaks_the_metadata_or_adds_to_it(name, tmp_path):
    config = VBLoRAConfig(base_model_name_or_path=name)
    update_model_card(tmp_path / "new", config)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    update_model_card(tmp_path, config)
    for folder, more in ((tmp_path / "new", {}), (tmp_path, {"license": "mit"})):
        card = ModelCard.load(folder / "README.md")
        tags = ["vblora-triton", "vblora"]
        assert card.data.to_dict() == {"base_model": name, "library_name": "peft", "tags": tags, **more}
        assert name.strip() in "\n" or name.isprintable() or name not in card.text


@pytest.mark.parametrize(
    "name",
    ["/home/me/secret/base", "C:\\Users\\me\\base", "C:/Users/me", "\\\\server\\x", "~/base", "../base", "./base"],
)
def test_a_path_of_ones_own_machine_is_not_in_the_card(name):
    card = model_card(VBLoRAConfig(base_model_name_or_path=name))
    assert ModelCard(card).data.base_model is None
    assert name not in card
    assert not re.search("secret|me/|me.base|server", card)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_cards_code_can_be_pasted_in_the_folder(task_type, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("someone/base")
    base = AutoModelForCausalLM.from_pretrained("someone/base")
    config = VBLoRAConfig(r=2, num_vectors=8, vector_length=16, target_modules=["q_proj"], task_type=task_type)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained("someone/base/mine")
    (tmp_path / "someone" / "base" / "mine" / "someone").symlink_to(tmp_path / "someone")
    monkeypatch.chdir("someone/base/mine")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "someone/base/mine/README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    tokens = torch.arange(6)[None]
    assert torch.equal(names["model"](tokens).logits, adapted.eval()(tokens).logits)


def test_the_cards_code_names_a_class_that_there_is_for_every_task():
    for task in [None, *TaskType]:
        card = model_card(VBLoRAConfig(base_model_name_or_path="someone/base", task_type=task))
        (name,) = re.findall(r"from vblora_triton import (\w+)", card)
        assert getattr(vblora_triton, name)._peft_class is PeftModel.class_for(VBLoRAConfig(task_type=task))

"""The model card: what the Hub reads of it, and what becomes of one that is there."""

from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from tests.models import tiny_llama
from vblora_triton import VBLoRAConfig, get_peft_model
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

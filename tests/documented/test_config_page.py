"""The examples of the page on VBLoRAConfig, word for word but for the import and the download of the model."""

import json

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.documented.models import VOCABULARY, AutoModelForCausalLM
from vblora_triton import PeftType, VBLoRAConfig, get_peft_model


class TestConfigPage:
    @pytest.mark.parametrize(
        ("fields", "kind", "layers", "adapted"),
        [
            ({"target_modules": ["q_proj", "v_proj"], "num_vectors": 60}, OPTForCausalLM, 2, 4),
            (
                {"target_modules": ["q_proj", "v_proj"], "num_vectors": 60, "save_only_topk_weights": True},
                OPTForCausalLM,
                2,
                4,
            ),
            ({"target_modules": "all-linear", "exclude_modules": ["lm_head"]}, OPTForCausalLM, 2, 12),
            (
                {
                    "vector_length": 512,
                    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                },
                LlamaForCausalLM,
                2,
                14,
            ),
            (
                {
                    "num_vectors": 60,
                    "target_modules": ["q_proj", "v_proj"],
                    "layers_to_transform": [0, 2, 4, 6, 8, 10],
                    "layers_pattern": "layers",
                },
                OPTForCausalLM,
                12,
                12,
            ),
        ],
        ids=["basic", "lightweight", "full", "large", "selective"],
    )
    def test_patterns_adapt_the_layers_that_they_say(self, fields, kind, layers, adapted):
        config = VBLoRAConfig(**{"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2} | fields)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("facebook/opt-125m", kind, layers), config)
        names = model.base_model.targeted_module_names
        assert len(names) == adapted
        if config.layers_to_transform:
            assert {int(name.split(".")[3]) for name in names} == {0, 2, 4, 6, 8, 10}

    @pytest.mark.parametrize("kind", [BertForSequenceClassification, RobertaForSequenceClassification])
    def test_task_specific_head(self, kind):
        config = VBLoRAConfig(
            r=4,
            num_vectors=60,
            vector_length=256,
            topk=2,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["classifier"],
            bias="vblora_only",
        )
        # These two families call q_proj and v_proj otherwise.
        config.target_modules = ["query", "value"]
        settings = BertConfig if kind is BertForSequenceClassification else RobertaConfig
        sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
        model = get_peft_model(kind(settings(**sizes, vocab_size=VOCABULARY)), config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("classifier.modules_to_save" in name for name in trained)
        assert any(name.endswith("query.base_layer.bias") for name in trained)
        assert not any(name.endswith("key.bias") for name in trained)

    def test_regex_and_gpt2(self):
        config = VBLoRAConfig(vector_length=16, target_modules=".*decoder.*(SelfAttention).*(q|v)$")
        t5 = T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCABULARY)
        )
        names = get_peft_model(t5, config).base_model.targeted_module_names
        assert sorted(names) == sorted(f"decoder.block.{n}.layer.0.SelfAttention.{m}" for n in (0, 1) for m in "qv")
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=VOCABULARY))
        model = get_peft_model(gpt2, VBLoRAConfig(vector_length=16, target_modules=["c_attn"], fan_in_fan_out=True))
        layer = model.base_model.model.transformer.h[0].attn.c_attn
        assert layer.fan_in_fan_out
        assert layer.get_delta_weight("default").shape == layer.weight.shape == (32, 96)

    def test_post_init_and_constraints(self):
        config = VBLoRAConfig(target_modules=["q_proj"], exclude_modules=["lm_head"])
        assert config.peft_type == PeftType.VBLORA
        assert config.target_modules == {"q_proj"}
        assert config.exclude_modules == {"lm_head"}
        with pytest.raises(ValueError, match="layers_to_transform"):
            VBLoRAConfig(layers_pattern="layers")
        with pytest.raises(ValueError, match="topk"):
            VBLoRAConfig(topk=0)
        base = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        with pytest.raises(ValueError, match="vector_length"):
            get_peft_model(base, VBLoRAConfig(vector_length=100, target_modules=["q_proj"]))

    def test_integration(self, base_model, tmp_path):
        config = VBLoRAConfig(
            r=4,
            num_vectors=60,
            vector_length=256,
            topk=2,
            target_modules=["q_proj", "v_proj"],
            save_only_topk_weights=False,  # Can resume training
        )
        model = get_peft_model(base_model, config)
        model.train()
        model.save_pretrained("checkpoint")
        config.save_only_topk_weights = True
        model.save_pretrained("checkpoint_optimized")
        sizes = [
            (tmp_path / name / "adapter_model.safetensors").stat().st_size
            for name in ("checkpoint", "checkpoint_optimized")
        ]
        assert sizes[1] < 0.8 * sizes[0]
        stored = json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())
        documented = {
            "peft_type": "VBLORA",
            "r": 4,
            "num_vectors": 60,
            "vector_length": 256,
            "topk": 2,
            "target_modules": ["q_proj", "v_proj"],
            "exclude_modules": None,
            "save_only_topk_weights": False,
            "vblora_dropout": 0.0,
            "init_vector_bank_bound": 0.02,
            "init_logits_std": 0.1,
            "fan_in_fan_out": False,
            "bias": "none",
            "modules_to_save": None,
        }
        assert stored | documented == stored

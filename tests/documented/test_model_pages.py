"""The examples of the two pages on VBLoRAModel, word for word but for the import and the download of the model."""

import pytest
import torch
from torch import nn
from transformers import (
    OPTForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.documented.models import AutoModelForCausalLM
from vblora_triton import AutoPeftModel, PeftModel, VBLoRAConfig, VBLoRAModel, get_peft_model
from vblora_triton.vblora.layer import Linear, VBLoRALayer


class TestModelPages:
    def test_basic_creation(self, base_model, capsys):
        config = VBLoRAConfig(
            r=4, num_vectors=256, vector_length=256, topk=2, target_modules=["fc1", "fc2", "q_proj", "v_proj"]
        )
        model = get_peft_model(base_model, config)
        model.print_trainable_parameters()
        model.print_savable_parameters()
        out = capsys.readouterr().out
        assert "trainable params: " in out
        assert "VB-LoRA params to-be-saved (float32-equivalent): " in out

    def test_the_printed_count_of_opt_125m(self, capsys):
        """The page prints 98,560; its own formula gives 49,920."""
        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", layers=12)
        config = VBLoRAConfig(
            r=4,
            num_vectors=60,
            vector_length=256,
            topk=2,
            target_modules=["q_proj", "v_proj"],
            save_only_topk_weights=False,
        )
        model = get_peft_model(base_model, config)
        model.print_savable_parameters()
        assert capsys.readouterr().out == (
            "VB-LoRA params to-be-saved (float32-equivalent): 49,920 || total params to-be-saved: 49,920\n"
        )

    def test_full_training(self, base_model, train_dataset):
        config = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            topk=2,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            vblora_dropout=0.1,
        )
        model = get_peft_model(base_model, config)
        training_args = TrainingArguments(
            output_dir="./vblora_model",
            num_train_epochs=3,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            use_cpu=True,
            report_to="none",
        )
        trainer = Trainer(
            model=model,
            args=training_args,
            train_dataset=train_dataset,
        )
        before = model.base_model.vblora_vector_bank["default"].detach().clone()
        trainer.train()
        assert trainer.state.epoch == 3
        assert not torch.equal(model.base_model.vblora_vector_bank["default"], before)

    def test_save_for_inference_only(self, base_model, train_dataset, input_ids):
        config = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            topk=2,
            save_only_topk_weights=True,  # Minimal storage
            target_modules=["q_proj", "v_proj"],
        )
        model = get_peft_model(base_model, config)
        arguments = TrainingArguments(output_dir="out", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
        trainer = Trainer(model=model, args=arguments, train_dataset=train_dataset)
        trainer.train()
        model.save_pretrained("./vblora_inference_only")
        expected = model.eval()(input_ids).logits

        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        model = PeftModel.from_pretrained(base_model, "./vblora_inference_only")
        model.eval()
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=1e-5)

    def test_training_to_deployment(self, base_model, train_dataset, input_ids):
        base_model.save_pretrained("base")
        base_model = OPTForCausalLM.from_pretrained("base")
        config = VBLoRAConfig(
            r=4,
            num_vectors=60,
            vector_length=256,
            topk=2,
            target_modules=["q_proj", "v_proj"],
            save_only_topk_weights=False,  # Full storage
        )
        model = get_peft_model(base_model, config)
        arguments = TrainingArguments(output_dir="out", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
        trainer = Trainer(model=model, args=arguments, train_dataset=train_dataset)
        trainer.train()
        model.save_pretrained("checkpoint_full")
        config.save_only_topk_weights = True
        model.save_pretrained("checkpoint_optimized")
        expected = model.eval()(input_ids).logits

        model = AutoPeftModel.from_pretrained("checkpoint_optimized")
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="top-k"):
            AutoPeftModel.from_pretrained("checkpoint_optimized", is_trainable=True)
        AutoPeftModel.from_pretrained("checkpoint_full", is_trainable=True)

    def test_multiple_adapters(self, base_model, input_ids):
        config1 = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base_model, config1, adapter_name="task1")
        config2 = VBLoRAConfig(r=8, num_vectors=512, vector_length=128, target_modules=["q_proj", "v_proj"])
        model.add_adapter("task2", config2)
        model.set_adapter("task1")
        output1 = model(input_ids)
        model.set_adapter("task2")
        output2 = model(input_ids)
        assert not torch.equal(output1.logits, output2.logits)
        assert model.vblora_vector_bank["task1"].shape == (256, 256)
        assert model.vblora_vector_bank["task2"].shape == (512, 128)

    def test_parameter_efficiency(self, base_model):
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base_model, config)
        vblora_params, other_params = model.get_nb_savable_parameters()
        print(f"VB-LoRA params (float32-equivalent): {vblora_params:,}")
        print(f"Other trainable params: {other_params:,}")
        print(f"Total params to-be-saved: {vblora_params + other_params:,}")
        base_params = sum(p.numel() for p in base_model.parameters())
        print(f"Compression ratio: {base_params / (vblora_params + other_params):.2f}x")
        assert (vblora_params, other_params) == (2 * 2 * 2 * 4 * 3 * 256 + 256 * 256, 0)

    def test_specific_layers(self):
        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", layers=12)
        config = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            target_modules=["q_proj", "v_proj"],
            layers_to_transform=[0, 1, 2, 3],  # First 4 layers
            layers_pattern="layers",
        )
        model = get_peft_model(base_model, config)
        assert {int(name.split(".")[3]) for name in model.base_model.targeted_module_names} == {0, 1, 2, 3}

    def test_merge_and_save_full_model(self, base_model, tokenizer, input_ids):
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base_model, config)
        expected = model(input_ids).logits
        model = model.merge_and_unload()
        model.save_pretrained("./merged_vblora_model")
        tokenizer.save_pretrained("./merged_vblora_model")
        again = OPTForCausalLM.from_pretrained("./merged_vblora_model")
        torch.testing.assert_close(again(input_ids).logits, expected, rtol=1e-4, atol=1e-5)

    def test_low_cpu_memory_usage(self, base_model):
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(
            base_model,
            config,
            adapter_name="default",
            low_cpu_mem_usage=True,  # Create empty weights on meta device
        )
        assert model.vblora_vector_bank["default"].is_meta

    def test_inference(self, base_model, tokenizer):
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, target_modules=["q_proj", "v_proj"])
        get_peft_model(base_model, config).save_pretrained("./vblora_adapter")

        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        model = PeftModel.from_pretrained(base_model, "./vblora_adapter")
        model.eval()
        with torch.no_grad():
            input_ids = tokenizer("Hello, how are you?", return_tensors="pt").input_ids
            outputs = model.generate(
                input_ids,
                max_length=50,
                num_return_sequences=1,
            )
        assert tokenizer.decode(outputs[0]).startswith("Hello")

    def test_regex(self):
        config = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            target_modules=r".*decoder.*(self_attn|encoder_attn).*(q|k|v)_proj$",
            exclude_modules=["lm_head"],
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("facebook/opt-125m"), config)
        found = {name.rpartition(".")[2] for name in model.base_model.targeted_module_names}
        assert found == {"q_proj", "k_proj", "v_proj"}

    def test_comparing_storage_modes(self):
        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        config_full = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, save_only_topk_weights=False)
        model_full = get_peft_model(base_model, config_full)
        full_params, _ = model_full.get_nb_savable_parameters()

        config_topk = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, save_only_topk_weights=True)
        with pytest.warns(UserWarning, match="taken off"):
            model_topk = get_peft_model(base_model, config_topk)
        topk_params, _ = model_topk.get_nb_savable_parameters()
        assert full_params / topk_params == pytest.approx(131_072 / 66_048)

    def test_attributes_and_methods_of_the_tables(self, base_model):
        config = VBLoRAConfig(num_vectors=60, vector_length=256, target_modules=["q_proj"])
        model = VBLoRAModel(base_model, config, "default", low_cpu_mem_usage=False)
        assert model.prefix == "vblora_"
        assert model.tuner_layer_cls is VBLoRALayer
        assert {"opt", "llama", "gpt2", "t5", "bert", "roberta"} <= set(model.target_module_mapping)
        assert isinstance(model.vblora_vector_bank, nn.ParameterDict)
        model._pre_injection_hook(base_model, config, "second")
        model._init_vblora_vector_bank(config, "third")
        assert model.vblora_vector_bank["third"].abs().max() <= 0.02
        layer = model._create_new_module(config, model.vblora_vector_bank, "third", nn.Linear(256, 256))
        assert isinstance(layer, Linear)
        with pytest.raises(ValueError, match="Embedding"):
            model._create_new_module(config, model.vblora_vector_bank, "third", nn.Embedding(3, 256))
        parent = base_model.model.decoder.layers[0].self_attn
        model._create_and_replace(
            config, "third", parent.k_proj, "k_proj", parent, "model.decoder.layers.0.self_attn.k_proj"
        )
        assert isinstance(parent.k_proj, Linear)
        assert model.get_nb_savable_parameters(adapter="default")[1] == 0

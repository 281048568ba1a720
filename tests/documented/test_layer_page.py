"""The examples of the page on VBLoRALayer, word for word but for the import and the download of the model."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    OPTModel,
)
from transformers.pytorch_utils import Conv1D

from tests.documented.models import VOCABULARY, AutoModelForCausalLM
from vblora_triton import VBLoRAConfig, get_peft_model
from vblora_triton.vblora.layer import Linear, VBLoRALayer


class TestLayerPage:
    @pytest.fixture
    def model(self):
        # The page reaches for `.decoder` of the adapted model: the one without a head has it.
        base_model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m", OPTModel)
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, topk=2, target_modules=["q_proj", "v_proj"])
        return get_peft_model(base_model, config)

    @pytest.fixture
    def vblora_layer(self, model):
        return model.base_model.model.decoder.layers[0].self_attn.q_proj

    def test_basic_usage(self, base_model, input_ids):
        config = VBLoRAConfig(r=4, num_vectors=256, vector_length=256, topk=2, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(base_model, config)
        outputs = model(input_ids)
        assert outputs.logits.shape == (2, 10, VOCABULARY)

    def test_accessing_layers(self, vblora_layer):
        assert isinstance(vblora_layer, VBLoRALayer)
        assert vblora_layer.vblora_logits_A["default"].shape == (4, 3, 256)
        assert vblora_layer.vblora_logits_B["default"].shape == (3, 4, 256)
        assert vblora_layer.vblora_vector_bank["default"].shape == (256, 256)

    def test_vector_selection(self, vblora_layer):
        adapter_name = "default"
        A, B = vblora_layer._get_lora_matrices(adapter_name)
        assert A.shape == (4, 768)  # (rank, in_features)
        assert B.shape == (768, 4)  # (out_features, rank)
        delta = vblora_layer.get_delta_weight(adapter_name)
        torch.testing.assert_close(delta, B @ A)

    def test_topk_selection(self, vblora_layer):
        logits_A = vblora_layer.vblora_logits_A["default"]
        topk = vblora_layer.topk["default"]
        top_k_logits, indices = logits_A[0, 0].topk(topk)
        weights = F.softmax(top_k_logits, dim=-1)
        bank = vblora_layer.vblora_vector_bank["default"]
        A, _ = vblora_layer._get_lora_matrices("default")
        torch.testing.assert_close(A[0, :256], weights @ bank[indices])
        torch.testing.assert_close(
            vblora_layer._get_low_rank_matrix(logits_A[0, 0], bank, topk), weights @ bank[indices]
        )

    def test_merging(self, vblora_layer):
        weight = vblora_layer.weight.detach().clone()
        vblora_layer.merge()
        assert vblora_layer.merged
        assert vblora_layer.merged_adapters == ["default"]
        vblora_layer.unmerge()
        assert not vblora_layer.merged
        assert torch.equal(vblora_layer.weight, weight)

    @pytest.mark.parametrize("broken", [False, True])
    def test_safe_merging(self, vblora_layer, broken, capsys):
        if broken:
            vblora_layer.vblora_vector_bank["default"].data.fill_(float("nan"))
        try:
            vblora_layer.merge(safe_merge=True)
            print("Merge successful, no NaNs detected")
        except ValueError as e:
            print(f"Merge failed: {e}")
        assert ("failed" in capsys.readouterr().out) is broken
        assert vblora_layer.merged is not broken

    def test_dropout(self, base_model, input_ids):
        config = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            vblora_dropout=0.1,  # Add dropout
            target_modules=["q_proj", "v_proj"],
            init_vector_bank_bound=0.5,
        )
        base_model.config.dropout = 0.0
        for module in base_model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0
        model = get_peft_model(base_model, config)
        model.train()
        output_train = model(input_ids)
        assert not torch.equal(output_train.logits, model(input_ids).logits)
        model.eval()
        output_eval = model(input_ids)
        assert torch.equal(output_eval.logits, model(input_ids).logits)

    def test_parameter_efficiency(self, model):
        vblora_layer = model.base_model.model.decoder.layers[0].self_attn.q_proj
        logits_A_params = vblora_layer.vblora_logits_A["default"].numel()
        logits_B_params = vblora_layer.vblora_logits_B["default"].numel()
        vector_bank_params = vblora_layer.vblora_vector_bank["default"].numel()
        assert logits_A_params == logits_B_params == 4 * 3 * 256
        assert vector_bank_params == 256 * 256
        assert sum(p is vblora_layer.vblora_vector_bank["default"] for p in model.parameters()) == 1

    def test_topk_mode(self, model, tmp_path):
        model.save_pretrained(tmp_path / "full_vblora")
        config_inference = VBLoRAConfig(
            r=4,
            num_vectors=256,
            vector_length=256,
            save_only_topk_weights=True,  # Minimal storage
        )
        assert config_inference.save_only_topk_weights

    def test_custom_forward(self, vblora_layer):
        x = torch.randn(2, 10, 768)
        vblora_layer.train()
        output = vblora_layer(x)
        vblora_layer.disable_adapters = True
        output_base = vblora_layer(x)
        assert torch.equal(output_base, vblora_layer.base_layer(x))
        torch.testing.assert_close(output, output_base + x @ vblora_layer.get_delta_weight("default").T)

    @pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
    def test_attributes_and_methods_of_the_tables(self, conv):
        assert VBLoRALayer.adapter_layer_names == ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
        base, bank = Conv1D(512, 256) if conv else nn.Linear(256, 512), nn.ParameterDict({"a": torch.randn(60, 256)})
        layer = Linear(base, bank, "a", 4, 60, 256, 2, 0.0, 0.01, conv, conv)
        assert isinstance(layer, nn.Linear)
        for name, kind in {
            "vblora_logits_A": nn.ParameterDict,
            "vblora_logits_B": nn.ParameterDict,
            "vblora_vector_bank": nn.ParameterDict,
            "r": dict,
            "topk": dict,
            "vblora_dropout": nn.ModuleDict,
            "merged_adapters": list,
        }.items():
            assert isinstance(getattr(layer, name), kind)
        bank["b"] = torch.randn(5, 128)
        layer.update_layer(
            adapter_name="b",
            vblora_vector_bank=bank,
            r=2,
            topk=1,
            num_vectors=5,
            vector_length=128,
            vblora_dropout=0.1,
            init_logits_std=0.01,
            inference_mode=False,
        )
        assert (layer.r, layer.topk) == ({"a": 4, "b": 2}, {"a": 2, "b": 1})
        layer.merge(safe_merge=True, adapter_names=["b"])
        assert layer.merged_adapters == ["b"]
        layer.unmerge()
        A, B = layer._get_lora_matrices(adapter="b", cast_to_fp32=True)
        delta = layer.get_delta_weight(adapter="b")
        torch.testing.assert_close(delta.T if conv else delta, B @ A)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert layer(torch.randn(3, 256)).shape == (3, 512)

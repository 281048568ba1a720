"""VeRA on a whole model: what is made, counted, switched and refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from tests.models import (
    VOCABULARY,
    adapted_by,
    assert_unchanged,
    enlarge,
    outputs,
    snapshot,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
)
from vblora_triton import VBLoRAConfig, VeraConfig, VeraModel, get_peft_model
from vblora_triton.vera.layer import VeraLayer
from vblora_triton.vera.projection import ProjectionDict

FIELDS = {"r": 6, "target_modules": ["q_proj", "v_proj"]}


adapted = partial(adapted_by, VeraConfig, FIELDS)


@pytest.mark.filterwarnings("ignore:`save_projection` is False")
@pytest.mark.parametrize("save_projection", [True, False], ids=["with", "without"])
def test_sizes_of_llama_2_7b_come_out_and_need_no_memory(save_projection):
    sizes = {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))
    model = get_peft_model(base, VeraConfig(target_modules=["q_proj", "v_proj"], save_projection=save_projection))
    # 64 layers of 256 + 4096; A and B of 256 x 4096.
    assert model.get_nb_trainable_parameters()[0] == 64 * (256 + 4096)
    own = 64 * (256 + 4096) + (2 * 256 * 4096 if save_projection else 0)
    assert model.get_nb_savable_parameters() == (own, 0)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_default_targets_are_loras_but_for_phi():
    config = VeraConfig(r=2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    get_peft_model(PhiForCausalLM(PhiConfig(**sizes, vocab_size=VOCABULARY)), config)
    assert config.target_modules == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="`target_modules` is None"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), VeraConfig(r=2))


def test_counts_are_per_adapter_and_printing_needs_none_named_default(capsys):
    model = adapted(name="mine")
    alone = model.get_nb_savable_parameters("mine")
    model.print_savable_parameters()
    assert f"VeRA params to-be-saved (float32-equivalent): {alone[0]:,d}" in capsys.readouterr().out
    model.add_adapter("second", VeraConfig(r=2, target_modules=["k_proj"], modules_to_save=["lm_head"]))
    assert model.get_nb_savable_parameters("mine") == alone
    # Two layers of 2 + 32; A (2, 64) and B (32, 2).
    assert model.get_nb_savable_parameters("second") == (2 * 34 + 128 + 64, tiny_llama().lm_head.weight.numel())
    with pytest.raises(ValueError, match="'default'"):
        model.get_nb_savable_parameters()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_take_the_dtype_asked_for_and_projections_stay_float32(dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(tiny_llama().to(dtype), VeraConfig(**FIELDS), autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if "vera_" in n} == {expected}
        assert {b.dtype for n, b in model.named_buffers() if "vera_" in n} == {torch.float32}
        assert outputs(model).dtype == dtype


def test_a_cast_model_computes_with_the_projections_it_was_trained_with():
    model = adapted()
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for lambdas in (p for n, p in cast.named_parameters() if "vera_" in n):
        lambdas.data = lambdas.data.float()
    exact = adapted(tiny_llama().to(torch.bfloat16))
    with torch.no_grad():
        for (name, own), (_, other) in zip(exact.named_parameters(), cast.named_parameters(), strict=True):
            if "vera_" in name:
                own.copy_(other)
    assert torch.equal(outputs(cast), outputs(exact))


def test_switching_disabling_and_deleting_do_what_they_say():
    model, base = adapted(name="a"), outputs(tiny_llama())
    first = outputs(model)
    model.add_adapter("b", VeraConfig(r=3, target_modules="all-linear", projection_prng_key=4))
    enlarge(model, seed=1)
    first = outputs(model)
    model.set_adapter("b")
    second = outputs(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".b") and "vera_lambda" in n
    }
    assert len({float(t.sum()) for t in (base, first, second)}) == 3
    with model.disable_adapter():
        assert torch.equal(outputs(model), base)
    model.delete_adapter("b")
    assert torch.equal(outputs(model), first)
    model.delete_adapter("a")
    assert torch.equal(outputs(model), base)
    assert not list(model.base_model.vera_A)
    assert not any(isinstance(module, VeraLayer) for module in model.modules())
    model.add_adapter("c", VeraConfig(**FIELDS))
    model.set_adapter("c")
    enlarge(model)
    assert not torch.equal(outputs(model), base)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_merging_gives_the_plain_model_with_the_adapters_outputs(make):
    model = adapted(make(), target_modules="all-linear")
    expected = outputs(model)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-5)
    assert type(merged) is type(make())
    assert not [name for name in merged.state_dict() if "vera" in name]


@pytest.mark.parametrize("bias", ["none", "all", "vera_only"])
def test_bias_trains_what_it_names(bias):
    model = get_peft_model(tiny_bert(), VeraConfig(r=3, target_modules=["query"], bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "vera_" not in n}
    every = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    assert every
    assert trained == {"none": set(), "all": every, "vera_only": {n for n in every if "query" in n}}[bias]


def test_status_names_the_layers_and_says_that_the_adapter_is_trained():
    model = adapted()
    layer, status = model.get_layer_status()[0], model.get_model_status()
    assert (layer.module_type, layer.requires_grad, layer.devices) == (
        "vera.Linear",
        {"default": True},
        {"default": ["cpu"]},
    )
    assert (status.adapter_model_type, status.peft_types, status.num_adapter_layers) == (
        "VeraModel",
        {"default": "VERA"},
        4,
    )
    assert status.trainable_params == model.get_nb_trainable_parameters()[0] == 2 * (6 + 64) + 2 * (6 + 32)


def test_both_methods_on_one_model_are_refused_by_name_and_change_nothing():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"VBLoRAConfig; give a vblora_triton.VeraConfig"):
        model.add_adapter("other", VBLoRAConfig(r=2, num_vectors=4, vector_length=16, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="exclude_modules"):
        model.add_adapter("other", VeraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"]))
    assert_unchanged(model, before)


def test_a_failure_half_way_takes_everything_off_again(monkeypatch):
    model = adapted()
    before, calls = snapshot(model), []

    def fails_later(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("no memory")
        return original(self, *args, **kwargs)

    original = VeraLayer.update_layer
    monkeypatch.setattr("vblora_triton.vera.layer.VeraLayer.update_layer", fails_later)
    with pytest.raises(RuntimeError, match="no memory"):
        model.add_adapter("other", VeraConfig(**FIELDS | {"projection_prng_key": 8}))
    assert_unchanged(model, before)
    assert list(model.base_model.vera_A) == list(model.base_model.vera_B) == ["default"]


def test_the_documented_hooks_make_projections_and_layers():
    model = adapted().base_model
    assert isinstance(model, VeraModel)
    config = VeraConfig(r=4, target_modules=["k_proj"])
    model._pre_injection_hook(model.model, config, "more")
    assert isinstance(model.vera_A, ProjectionDict)
    assert (model.vera_A["more"].shape, model.vera_B["more"].shape) == ((4, 64), (32, 4))
    layer = model._create_new_module(config, model.vera_A, model.vera_B, "more", nn.Linear(64, 32))
    assert isinstance(layer, model.tuner_layer_cls)
    with pytest.raises(TypeError, match="Embedding"):
        model._create_new_module(config, model.vera_A, model.vera_B, "more", nn.Embedding(4, 4))


def test_conv1d_decides_fan_in_fan_out_without_a_warning(recwarn):
    config = VeraConfig(r=3, target_modules=["c_attn"])
    get_peft_model(tiny_gpt2(), config)
    assert config.fan_in_fan_out is True
    assert not recwarn.list


def test_only_the_layers_asked_for_size_the_projections():
    model = adapted(target_modules="all-linear", exclude_modules=["mlp.*", "down_proj", "gate_proj", "up_proj"])
    assert model.base_model.vera_A["default"].shape == (6, 64)
    assert model.base_model.vera_B["default"].shape == (64, 6)
    assert adapted(target_modules="all-linear").base_model.vera_B["default"].shape == (96, 6)
    first = adapted(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")
    assert first.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("keep", [True, False])
def test_a_float64_weight_keeps_its_bits_when_nothing_is_merged_into_it(keep):
    # Drawn in float64: values that float32 does not have.
    base = tiny_llama().double()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter)
    model = get_peft_model(base, VeraConfig(**FIELDS))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, layer in model.base_model.adapted_layers():
        layer.keep_base_weight = keep
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name

"""VB-LoRA on a whole model: what is drawn, counted and refused."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import DEVICE, enlarge, outputs, tiny_gpt2, tiny_llama
from vblora_triton import VBLoRAConfig, VBLoRAModel, get_peft_model, use_backend

FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(("only_topk", "expected"), [(False, 998_400), (True, 39_936)])
def test_the_published_sizes_of_llama_2_7b_come_out(only_topk, expected):
    sizes = {"hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = VBLoRAConfig(
        r=4, num_vectors=60, vector_length=256, topk=2, target_modules=targets, save_only_topk_weights=only_topk
    )
    model = get_peft_model(base, config)
    assert model.get_nb_savable_parameters() == (expected, 0)
    assert model.get_nb_trainable_parameters()[0] == 998_400
    assert all(p.is_meta for p in model.parameters())


def test_the_bank_is_drawn_once_whatever_the_number_of_layers():
    drawn = []
    for layers in (1, 2):
        base = tiny_llama()
        torch.manual_seed(5)
        config = VBLoRAConfig(**FIELDS, layers_to_transform=list(range(layers)))
        drawn.append(get_peft_model(base, config).base_model.vblora_vector_bank["default"])
    assert torch.equal(*drawn)


def test_logits_are_normal_and_the_bank_uniform_in_float32():
    config = VBLoRAConfig(**FIELDS | {"num_vectors": 200}, init_logits_std=0.5, init_vector_bank_bound=0.03)
    model = get_peft_model(tiny_llama().to(torch.bfloat16), config)
    bank = model.base_model.vblora_vector_bank["default"]
    logits = torch.cat([layer.vblora_logits_A["default"].flatten() for _, layer in model.base_model.adapted_layers()])
    assert bank.dtype == logits.dtype == torch.float32
    assert bank.abs().max() <= 0.03
    assert bank.std().item() == pytest.approx(0.03 / 3**0.5, rel=0.05)
    assert logits.mean().item() == pytest.approx(0, abs=0.03)
    assert logits.std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_autocast_adapters_have_the_dtype_of_the_base(dtype):
    model = get_peft_model(tiny_llama().to(dtype), VBLoRAConfig(**FIELDS), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in model.named_parameters() if "vblora_" in n} == {dtype}
    assert outputs(model).dtype == dtype


def test_the_bank_is_one_parameter_of_the_model():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS))
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "vector_bank" in name]
    assert names == ["base_model.vblora_vector_bank.default"]
    assert [name for name in model.state_dict() if "vector_bank" in name] == names
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.vblora_vector_bank["default"] is model.base_model.vblora_vector_bank["default"]


def test_sizes_that_do_not_divide_name_every_layer_and_lengths_that_would_do():
    config = VBLoRAConfig(num_vectors=10, vector_length=64, target_modules="all-linear")
    with pytest.raises(ValueError, match="`vector_length` is 64") as caught:
        get_peft_model(tiny_llama(), config)
    message = str(caught.value)
    for layer in (0, 1):
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            assert f"model.layers.{layer}.{name}" in message
    assert "q_proj" not in message
    assert "32 and 16 and 8 divide" in message
    get_peft_model(tiny_llama(), VBLoRAConfig(num_vectors=10, vector_length=32, target_modules="all-linear"))


@pytest.mark.parametrize(("asked", "suggested"), [(3, "8 and 4 and 2 divide"), (1000, "64 and 32 and 16 divide")])
def test_the_lengths_nearest_to_the_one_asked_for_are_suggested(asked, suggested):
    config = VBLoRAConfig(num_vectors=10, vector_length=asked, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=suggested):
        get_peft_model(tiny_llama(), config)


def test_counts_are_per_adapter():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS), adapter_name="first")
    alone = model.get_nb_savable_parameters("first")
    model.add_adapter("second", VBLoRAConfig(**FIELDS | {"r": 1, "num_vectors": 5}, modules_to_save=["lm_head"]))
    assert model.get_nb_savable_parameters("first") == alone
    own, other = model.get_nb_savable_parameters("second")
    assert own < alone[0]
    assert other == tiny_llama().lm_head.weight.numel()
    with pytest.raises(ValueError, match="'default'"):
        model.get_nb_savable_parameters()


def test_printing_the_counts_needs_no_adapter_named_default(capsys):
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS), adapter_name="mine")
    model.print_savable_parameters()
    own, _ = model.get_nb_savable_parameters("mine")
    assert f"{own:,d}" in capsys.readouterr().out


def test_the_documented_hooks_make_banks_and_layers():
    model = get_peft_model(tiny_gpt2(), VBLoRAConfig(**FIELDS | {"target_modules": ["c_attn"]})).base_model
    assert isinstance(model, VBLoRAModel)
    assert model.prefix == "vblora_"
    config = VBLoRAConfig(**FIELDS)
    model._pre_injection_hook(model.model, config, "more")
    assert model.vblora_vector_bank["more"].shape == (10, 16)
    layer = model._create_new_module(config, model.vblora_vector_bank, "more", nn.Linear(16, 32))
    assert isinstance(layer, model.tuner_layer_cls)
    with pytest.raises(ValueError, match="Embedding"):
        model._create_new_module(config, model.vblora_vector_bank, "more", nn.Embedding(4, 4))


def test_conv1d_decides_fan_in_fan_out_without_a_warning(recwarn):
    config = VBLoRAConfig(**FIELDS | {"target_modules": ["c_attn"]})
    enlarge(get_peft_model(tiny_gpt2(), config))
    assert config.fan_in_fan_out is True
    assert not recwarn.list


class Reads(TorchDispatchMode):
    """Counts the operations that wait for the device to hand a value to Python, or look for infinities."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.isinf)
        return func(*args, **(kwargs or {}))


def reads_of_a_training_step(model) -> int:
    parts = [module for module in model.train().modules() if hasattr(module, "vblora_logits_A")]
    with Reads() as reads:
        for layer in parts:
            layer(torch.randn(2, layer.in_features, device=DEVICE)).sum().backward()
    return reads.count


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_training_step_asks_the_device_for_no_value(backend):
    # By what runs on a GPU; on a CPU "auto" may look, for nothing has to be waited for there.
    with use_backend(backend):
        assert reads_of_a_training_step(get_peft_model(tiny_llama().to(DEVICE), VBLoRAConfig(**FIELDS))) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pefts_does_ask():
    """So that the test above is known to count."""
    peft = pytest.importorskip("peft")
    assert reads_of_a_training_step(peft.get_peft_model(tiny_llama().to(DEVICE), peft.VBLoRAConfig(**FIELDS))) > 0


def test_a_trained_model_learns_with_every_parameter_of_the_adapter():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, init_vector_bank_bound=0.5))
    ids = torch.arange(14).reshape(2, 7)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[name]) for name, p in parameters.items())

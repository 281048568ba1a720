"""transformers models on quantised bases: trained, merged, saved and reloaded; ours, and PEFT's that are patched."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from tests.quantised import dequantised, loading, rounding
from tests.test_out_of_memory import FailAt
from vblora_triton import (
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    parameter_groups,
    patch_peft,
    prepare_model_for_kbit_training,
)
from vblora_triton.integrations import quantization
from vblora_triton.tuner.layer import UnsupportedTargetError

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

METHODS = {
    "vblora": lambda **fields: VBLoRAConfig(r=2, num_vectors=8, vector_length=32, init_vector_bank_bound=0.3, **fields),
    "vera": lambda **fields: VeraConfig(r=8, d_initial=1.0, **fields),
}
BOTH = pytest.mark.parametrize("method", METHODS)
STEPS = 20
pytestmark = pytest.mark.filterwarnings(
    "ignore:The base weights are quantised", "ignore::FutureWarning", "ignore:.*torch.utils.checkpoint"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    # Blocks of 4-bit weights lie in one row, as in every model of a useful size.
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def load(folder, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **loading(name, dtype))


def batches() -> torch.Tensor:
    """Texts of six different tokens, so that something can be learnt."""
    return torch.randint(0, 6, (STEPS, 2, 16), generator=torch.Generator().manual_seed(5))


def losses(model: nn.Module, groups=None) -> torch.Tensor:
    """Train, and return the loss of each step."""
    optimizer = torch.optim.AdamW(groups or [p for p in model.parameters() if p.requires_grad], lr=0.02)
    found = []
    for tokens in batches():
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def adapt(base: nn.Module, method: str) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method](target_modules="all-linear", task_type="CAUSAL_LM")).train()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]).logits


@BOTH
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_training_merging_and_files_on_a_quantised_base(name, method, folder, tmp_path):
    base = load(folder, name)
    model = adapt(base, method)
    own = losses(model, parameter_groups(model))
    plain = adapt(dequantised(load(folder, name)), method)
    torch.testing.assert_close(own, losses(plain, parameter_groups(plain)), rtol=0, atol=1e-5)
    assert own[-1] < own[0] - 0.05
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, name), tmp_path / "adapter")
    torch.testing.assert_close(logits(again.train()), logits(model), rtol=0, atol=1e-6)

    layers = dict(model.base_model.adapted_layers())
    assert len(layers) == 14
    exact = {
        key: quantization.weight(layer.base_layer).double() + layer.get_delta_weight("default").double()
        for key, layer in layers.items()
    }
    merged = model.merge_and_unload()
    for key, wanted in exact.items():
        error = (quantization.weight(merged.get_submodule(key)).double() - wanted).abs()
        assert (error <= rounding(name, wanted)).all(), key
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for key in exact:
        kept = quantization.weight(reloaded.get_submodule(key))
        assert torch.equal(kept, quantization.weight(merged.get_submodule(key))), key


@BOTH
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_patched_peft_trains_on_a_quantised_base_and_ours_merges_it(name, method, folder, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}

    def by_peft(base):
        torch.manual_seed(1)
        if method == "vblora":
            config = peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=32, init_vector_bank_bound=0.3, **fields)
        else:
            config = peft.VeraConfig(r=8, d_initial=1.0, **fields)
        return peft.get_peft_model(base, config).train()

    model = by_peft(load(folder, name))
    with patch_peft():
        own = losses(model)
    torch.testing.assert_close(own, losses(by_peft(dequantised(load(folder, name)))), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(load(folder, name), tmp_path)
    torch.testing.assert_close(logits(ours.train()), logits(model), rtol=0, atol=1e-5)
    layer = ours.base_model.model.model.layers[0].mlp.down_proj
    wanted = quantization.weight(layer.base_layer).double() + layer.get_delta_weight("default").double()
    merged = ours.merge_and_unload().model.layers[0].mlp.down_proj
    assert ((quantization.weight(merged).double() - wanted).abs() <= rounding(name, wanted)).all()


@pytest.mark.parametrize("prepare", ["ours", "peft"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("nested nf4", "vblora"), ("int8", "vera"), ("torchao int8", "vblora"), ("torchao fp8", "vera")],
)
def test_trainer_with_checkpointing_dropout_and_bf16_learns_and_goes_on(name, method, prepare, folder, tmp_path):
    if prepare == "peft":
        prepared = pytest.importorskip("peft").prepare_model_for_kbit_training
    else:
        prepared = prepare_model_for_kbit_training
    base = prepared(load(folder, name, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False})
    assert base.is_gradient_checkpointing
    torch.manual_seed(1)
    dropout = {f"{method}_dropout": 0.05}
    # The usual choice for a Llama: q_proj and v_proj.
    model = get_peft_model(base, METHODS[method](task_type="CAUSAL_LM", **dropout))
    assert len(model.targeted_module_names) in (2, 4)
    rows = [{"input_ids": row, "labels": row.clone()} for row in batches().flatten(0, 1)]
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 7, "bf16": True}
    arguments = TrainingArguments(
        str(tmp_path), **options, use_cpu=True, report_to="none", save_steps=6, disable_tqdm=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    curve = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(curve[-3:]) < sum(curve[:3]) - 0.05
    saved = PeftModel.from_pretrained(load(folder, name, torch.bfloat16), tmp_path / "checkpoint-12")
    for key, value in saved.state_dict().items():
        if "vblora_" in key or "vera_lambda" in key:
            assert torch.equal(value, model.state_dict()[key]), key


def state(model: nn.Module) -> list:
    """What the layers of a model hold, by value."""
    found = []
    for key, layer in model.base_model.adapted_layers():
        kept = quantization.content(layer.base_layer)
        scales = [value.clone() for value in kept.beside.values() if isinstance(value, torch.Tensor)]
        found.append((key, list(layer.merged_adapters), layer.keep_base_weight, kept.data.clone(), *scales))
    return found


def same(one: list, other: list) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for these, those in zip(one, other, strict=True)
        for a, b in zip(these, those, strict=True)
    )


@pytest.mark.parametrize("name", ["nested nf4", "int8", "torchao int8"])
@pytest.mark.parametrize("operation", ["merge_adapter", "merge_and_unload", "unmerge_adapter"])
def test_merging_that_runs_out_of_memory_changes_nothing(name, operation, folder):
    base = load(folder, name)
    model = get_peft_model(base, METHODS["vera"](target_modules=["k_proj", "v_proj"], init_weights=False))
    if operation == "unmerge_adapter":
        model.merge_adapter()
    before, failed = state(model), 0
    for n in range(0, 400, 3):
        try:
            with FailAt(n):
                getattr(model, operation)()
        except torch.OutOfMemoryError:
            failed += 1
            assert same(state(model), before), n
        else:
            break
    assert n < 399
    # What was kept is put back without making anything.
    assert failed > 2 or operation == "unmerge_adapter"


def test_layers_of_a_model_are_merged_in_place_with_one_warning_and_unmerged(folder):
    model = adapt(load(folder, "nf4"), "vblora").eval()
    before = state(model)
    with pytest.warns(UserWarning, match="merging rounds them") as told:
        model.merge_adapter()
    assert len([warning for warning in told if "merging rounds" in str(warning.message)]) == 1
    assert not same(state(model), before)
    model.unmerge_adapter()
    assert same(state(model), before)


# Layers of libraries that are not here: the classes' own names and what they keep their weight in.


def stand_in(module: str, name: str, bases: tuple[type, ...], make) -> nn.Module:
    layer = type(name, bases, {"__module__": module, "forward": lambda self, x: F.linear(x, self.dequantize())})
    layer.dequantize = lambda self: self.packed.float() * self.scale
    made = layer.__new__(layer)
    nn.Module.__init__(made)
    torch.manual_seed(0)
    packed = torch.randint(-9, 9, (48, 32), dtype=torch.int8)
    made.register_buffer("packed", packed)
    made.register_buffer("scale", torch.tensor(0.02))
    made.bias = None
    make(made)
    return made


def sizes(layer, in_name="in_features", out_name="out_features"):
    setattr(layer, in_name, 32)
    setattr(layer, out_name, 48)


def hqq(layer):
    sizes(layer)
    layer.W_q = nn.Parameter(layer.packed.to(torch.uint8), requires_grad=False)


def gptq(layer):
    sizes(layer)
    layer.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))


def old_gptq(layer):
    sizes(layer, "infeatures", "outfeatures")
    layer.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))


def fp8(layer):
    sizes(layer)
    layer.weight = nn.Parameter(torch.zeros(48, 32).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(torch.ones(1, 1), requires_grad=False)


def int8(layer):
    sizes(layer)
    layer.weight = nn.Parameter(layer.packed, requires_grad=False)


OTHERS = {
    "HQQ": ("hqq.core.quantize", "HQQLinear", (nn.Module,), hqq),
    "GPTQ": ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", (nn.Module,), gptq),
    "AutoGPTQ": ("auto_gptq.nn_modules.qlinear.qlinear_cuda", "QuantLinear", (nn.Module,), old_gptq),
    "AWQ": ("awq.modules.linear.gemm", "WQLinear_GEMM", (nn.Module,), gptq),
    "quanto": ("optimum.quanto.nn.qlinear", "QLinear", (nn.Linear,), int8),
    "finegrained fp8": ("transformers.integrations.finegrained_fp8", "FP8Linear", (nn.Linear,), fp8),
    "somebody's": ("somebody", "MyLinear", (nn.Linear,), int8),
}


@BOTH
@pytest.mark.parametrize("other", OTHERS)
def test_other_quantised_layers_are_trained_around_and_merging_is_refused_by_name(other, method):
    module, name, *_ = OTHERS[other]
    layer = stand_in(*OTHERS[other])
    base = nn.Sequential(layer, nn.Linear(48, 32)).eval()
    config = METHODS[method](target_modules="all-linear") if method == "vera" else VBLoRAConfig(
        r=2, num_vectors=4, vector_length=16, target_modules="all-linear"
    )  # fmt: skip
    x = torch.randn(32, 32)
    plain = base(x)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert len(model.targeted_module_names) in (2, 4)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    x.requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in trained)
    weights = [p.detach().clone() for p in model.parameters()]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=f"{module}.*{name}.*merging into quantised weights"):
            merge()
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_torchao_layer_that_quantises_its_input_is_called_and_not_merged():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    base = nn.Sequential(nn.Linear(64, 96))
    quantize_(base, Int8DynamicActivationInt8WeightConfig())
    model = get_peft_model(base, METHODS["vera"](target_modules=["0"]))
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(32, 64))).all()
    with pytest.raises(TypeError, match=r"Linear.*Int8Tensor.*merging into quantised weights"):
        model.merge_adapter()


def test_a_module_that_only_has_sizes_is_no_linear_layer():
    class Router(nn.Module):
        in_features = out_features = 32

    with pytest.raises(UnsupportedTargetError, match="Router"):
        get_peft_model(nn.Sequential(Router(), nn.Linear(32, 32)), METHODS["vera"](target_modules=["0"]))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    tokens = batches()[0]
    loss = model.train()(input_ids=tokens, labels=tokens).loss
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def test_an_evaluation_before_does_not_change_the_gradients_of_4_bits(folder):
    # Called to evaluate, bitsandbytes would repack weights on some processors, and their product has no gradient then.
    def adapted(evaluate=False):
        base = load(folder, "nf4")
        if evaluate:
            base.eval()(input_ids=batches()[0])
        torch.manual_seed(1)
        return get_peft_model(base, METHODS["vblora"](target_modules=["q_proj"]))

    expected, model = gradients(adapted()), adapted()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(input_ids=batches()[0])
    for found, wanted in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    # Of one that was repacked before, the scales are what bfloat16 left of them.
    for found, wanted in zip(gradients(adapted(evaluate=True)), expected, strict=True):
        assert (found - wanted).norm() < 0.05 * wanted.norm()


@BOTH
def test_a_merge_between_forward_and_backward_is_named(folder, method):
    model = get_peft_model(load(folder, "nf4"), METHODS[method](target_modules=["q_proj"])).train()
    # A layer that reads what has a gradient.
    model.enable_input_require_grads()
    loss = model(input_ids=torch.cat([batches()[0]] * 2)).logits.square().sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="changed, as merging does, between forward and backward"):
        loss.backward()

"""Adapters as LoRA: real PEFT computes the same with them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.exchange.adapters import CASES, LLAMA, VBLORA, save
from tests.models import enlarge, outputs, tiny_bert, tiny_llama, tiny_opt
from vblora_triton import VBLoRAConfig, VeraConfig, convert_to_lora, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_with_the_lora(case, tmp_path):
    peft = pytest.importorskip("peft")
    saved = save(tmp_path, *CASES[case])
    done = convert_to_lora(saved.adapter, tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(saved.base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(outputs(loaded), saved.logits, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"] == done.rank
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(min(t.shape) == done.rank for t in tensors.values())
    assert len(tensors) == 2 * done.layers


def apart(folder, model):
    """Save an adapter that names no base model."""
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    return outputs(model.eval())


@pytest.mark.parametrize("make", [VBLoRAConfig, VeraConfig])
@pytest.mark.parametrize("bias", ["none", "all", "only"])
def test_biases_and_modules_trained_whole_are_carried_and_no_base_is_needed(make, bias, tmp_path):
    peft = pytest.importorskip("peft")
    size = {"vector_length": 16, "num_vectors": 10} if make is VBLoRAConfig else {}
    bias = f"{make.type_name.lower()}_only" if bias == "only" else bias
    fields = {"r": 3, "bias": bias, "modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}
    model = enlarge(get_peft_model(tiny_opt(), make(**fields, **size)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.5)
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(-1)
    expected = apart(tmp_path / "adapter", model)
    convert_to_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tiny_opt(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5)


def test_head_of_a_classifier_is_carried(tmp_path):
    peft = pytest.importorskip("peft")
    config = VBLoRAConfig(**VBLORA, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = enlarge(get_peft_model(tiny_bert(), config)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.mul_(-3)
    expected = apart(tmp_path / "adapter", model)
    convert_to_lora(tmp_path / "adapter", tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5)


def test_of_a_model_it_returns_what_peft_returns(tmp_path):
    peft = pytest.importorskip("peft")
    model = enlarge(get_peft_model(tiny_llama(), VBLoRAConfig(**VBLORA | LLAMA))).eval()
    for rank in (3, 0.5, 5):
        config, tensors = convert_to_lora(model, rank)
        assert isinstance(config, peft.LoraConfig)
        base = peft.get_peft_model(tiny_llama(), config)
        peft.set_peft_model_state_dict(base, tensors)
        torch.testing.assert_close(outputs(base.eval()), outputs(model), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="`rank` is 2, but the factors of adapter 'default' have 3"):
        convert_to_lora(model, 2)
    with pytest.raises(TypeError, match="LlamaForCausalLM without adapters"):
        convert_to_lora(tiny_llama(), 4)


def test_vera_asks_for_the_base_where_the_file_does_not_tell_the_inputs(tmp_path):
    for name, fields in {"full": {}, "bare": {"save_projection": False, "target_modules": ["q_proj"]}}.items():
        model = enlarge(get_peft_model(tiny_llama(), VeraConfig(**{"r": 5} | LLAMA | fields)))
        expected = apart(tmp_path / name, model)
        with pytest.raises(ValueError, match=r"does not say how many inputs .*give the base model"):
            convert_to_lora(tmp_path / name, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
        convert_to_lora(tmp_path / name, tmp_path / f"{name}-lora", base=tiny_llama())
        peft = pytest.importorskip("peft")
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / f"{name}-lora").eval()
        torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5)


def test_16_bits_are_the_rounded_factors(tmp_path):
    apart(tmp_path / "adapter", enlarge(get_peft_model(tiny_llama(), VBLoRAConfig(**VBLORA | LLAMA))))
    convert_to_lora(tmp_path / "adapter", tmp_path / "lora")
    done = convert_to_lora(tmp_path / "adapter", tmp_path / "half", dtype="float16")
    assert any("rounded from float32 to float16" in note for note in done.notes)
    exact, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "half"))
    assert done.bytes == (tmp_path / "half" / "adapter_model.safetensors").stat().st_size
    for key, tensor in exact.items():
        assert torch.equal(half[key], tensor.half())


def broken(fields, message, **changes):
    return pytest.param(fields, changes, message, id=message.split()[-1].strip("'."))


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        broken({"bias": "all"}, "`bias` is 'all'"),
        broken({"modules_to_save": ["lm_head"]}, "lm_head whole, and vLLM takes only"),
        broken({"r": 520, "target_modules": ["q_proj"]}, "rank is 520, but vLLM takes at most 512"),
        broken({}, "`base_model_name_or_path` is not set", base_model_name_or_path=None),
        broken({}, "`dtype` is 'float32', but vLLM", dtype="float32"),
    ],
)
def test_what_vllm_would_refuse_is_refused_by_name(fields, changes, message, tmp_path):
    model = enlarge(get_peft_model(tiny_llama(), VBLoRAConfig(**VBLORA | LLAMA | fields)))
    model.peft_config["default"].base_model_name_or_path = changes.get("base_model_name_or_path", "some/model")
    if "base_model_name_or_path" in changes:
        model.base_model.model.config._name_or_path = ""
        model.base_model.model.name_or_path = ""
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        convert_to_lora(tmp_path / "adapter", tmp_path / "lora", engine="vllm", dtype=changes.get("dtype"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_for_vllm_it_says_the_rank_the_rounding_and_the_name(tmp_path):
    model = enlarge(get_peft_model(tiny_llama(), VBLoRAConfig(**VBLORA | LLAMA)))
    model.peft_config["default"].base_model_name_or_path = "some/model"
    model.save_pretrained(tmp_path / "adapter")
    done = convert_to_lora(tmp_path / "adapter", tmp_path / "lora", engine="vllm")
    said = "; ".join(done.notes)
    assert done.dtype == "bfloat16"
    assert "--max-lora-rank 8" in said
    assert "rounded from float32 to bfloat16" in said
    assert "'some/model'" in said

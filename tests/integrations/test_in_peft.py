"""PEFT's functions, trl's trainer and transformers' mixin take what is ours, however they came by PEFT's names."""

import copy

import pytest
import torch
from torch import nn

from tests.models import adapted_by, outputs, tiny_bert, tiny_llama
from vblora_triton import (
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_layer_status,
    get_model_status,
    get_peft_model,
    save_as_lora,
)

peft = pytest.importorskip("peft")
# As a user's module has them, bound before anything of ours was asked about.
from peft import get_peft_model as peft_get_peft_model  # noqa: E402
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict  # noqa: E402

FIELDS = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
METHODS = {"vblora": (VBLoRAConfig, FIELDS | {"num_vectors": 10, "vector_length": 16}), "vera": (VeraConfig, FIELDS)}
BOTH = pytest.mark.parametrize(("kind", "fields"), METHODS.values(), ids=METHODS)


@BOTH
def test_add_adapter_of_transformers_takes_a_configuration_of_ours(kind, fields):
    model = tiny_llama()
    model.add_adapter(kind(**fields, modules_to_save=["lm_head"]))
    assert type(model.model.layers[0].self_attn.q_proj).__module__.startswith("vblora_triton.")
    assert model.active_adapters() == ["default"]
    prefix = {"vblora": "vblora_", "vera": "vera_lambda"}[kind.type_name.lower()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(prefix in name or "lm_head.modules_to_save.default" in name for name in trained)
    if kind is VBLoRAConfig:
        assert "vblora_vector_bank.default" in trained
    before = outputs(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    changed = outputs(model)
    assert not torch.allclose(changed, before, atol=1e-3)
    state = model.get_adapter_state_dict()
    assert {f"base_model.model.{key}" for key in state} >= {"base_model.model.lm_head.weight"}
    model.disable_adapters()
    assert torch.equal(outputs(model), outputs(tiny_llama()))
    model.enable_adapters()
    # transformers leaves modules that are saved whole turned off, PEFT's too.
    model.lm_head.enable_adapters(True)
    assert torch.equal(outputs(model), changed)
    other = tiny_llama()
    other.add_adapter(kind(**fields, modules_to_save=["lm_head"]))
    set_peft_model_state_dict(other, state)
    assert torch.equal(outputs(other), changed)
    model.add_adapter(kind(**fields), "second")
    assert model.active_adapters() == ["second"]
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(outputs(model), changed)


@BOTH
def test_pefts_own_functions_make_and_fill_models_of_ours(kind, fields):
    model = peft_get_peft_model(tiny_llama(), kind(**fields, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    assert issubclass(type(model), PeftModel)
    plain = inject_adapter_in_model(kind(**fields), tiny_llama())
    assert type(plain) is type(tiny_llama())
    state = get_peft_model_state_dict(model)
    assert "base_model.model.lm_head.weight" in state
    other = get_peft_model(tiny_llama(), kind(**fields, modules_to_save=["lm_head"]))
    set_peft_model_state_dict(other, {key: torch.ones_like(tensor) for key, tensor in state.items()})
    assert all((tensor == 1).all() for tensor in get_peft_model_state_dict(other).values())


@pytest.mark.parametrize("name", ["VBLoRAConfig", "VeraConfig"])
def test_our_functions_take_pefts_own_configurations(name):
    kind, fields = METHODS[name.removesuffix("Config").lower()]
    theirs = getattr(peft, name)(**fields)
    model = get_peft_model(tiny_llama(), theirs)
    assert type(model.active_peft_config) is kind
    ours, given = model.active_peft_config.to_dict(), theirs.to_dict()
    assert {key: ours[key] for key in given.keys() - {"base_model_name_or_path"}} == {
        key: value for key, value in given.items() if key != "base_model_name_or_path"
    }
    model.add_adapter("second", getattr(peft, name)(**fields | {"r": 3}))
    assert [config.r for config in model.peft_config.values()] == [2, 3]
    with pytest.raises(TypeError, match="VBLoRAConfig"):
        get_peft_model(tiny_llama(), object())
    with pytest.raises(ValueError, match="LORA"):
        get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))


@BOTH
def test_pefts_status_of_our_models_is_ours(kind, fields):
    model = adapted_by(kind, fields | {"modules_to_save": ["lm_head"]})
    model.add_adapter("second", kind(**fields))
    for changed in (model, model.get_base_model()):
        theirs, ours = peft.get_model_status(changed), get_model_status(changed)
        assert vars(theirs) == vars(ours)
        assert [vars(layer) for layer in peft.get_layer_status(changed)] == [
            vars(layer) for layer in get_layer_status(changed)
        ]


@BOTH
def test_an_adapter_inside_fsdp_version_1_is_saved_whole(kind, fields, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        model = adapted_by(kind, fields | {"modules_to_save": ["lm_head"]}).eval()
        expected = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id="cpu")
        found = get_peft_model_state_dict(sharded)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        with pytest.raises(TypeError, match="FSDP"):
            set_peft_model_state_dict(sharded, found)
    finally:
        torch.distributed.destroy_process_group()


@BOTH
def test_trls_trainer_trains_an_adapter_of_ours(kind, fields, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{n}": n for n in range(40)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": "none"}
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        args=trl.SFTConfig(output_dir=str(tmp_path), learning_rate=0.1, gradient_checkpointing=False, **options),
        train_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}),
        processing_class=tokenizer,
        peft_config=kind(**fields),
    )
    assert issubclass(type(trainer.model), PeftModel)
    before = copy.deepcopy(get_peft_model_state_dict(trainer.model))
    trainer.train()
    after = get_peft_model_state_dict(trainer.model)
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    assert torch.equal(outputs(again), outputs(trainer.model.eval()))


@BOTH
def test_an_adapter_saved_as_lora_is_read_by_peft_and_does_the_same(kind, fields, tmp_path):
    model = adapted_by(kind, fields).eval()
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path / "lora", model, rank=2)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert theirs.active_peft_config.peft_type == "LORA"
    torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-4, atol=1e-4)


def test_all_linear_on_a_classifier_adapts_what_pefts_does():
    for task in (None, "SEQ_CLS"):
        theirs = peft.get_peft_model(tiny_bert(), peft.VeraConfig(r=2, target_modules="all-linear", task_type=task))
        ours = get_peft_model(tiny_bert(), VeraConfig(r=2, target_modules="all-linear", task_type=task))
        names = {name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "vera_lambda_b")}
        assert set(ours.base_model.targeted_module_names) == names
        assert any("classifier" in name for name in names) == (task is None)


def test_a_plain_module_is_still_pefts_to_answer_for():
    model = inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 4)))
    assert set(get_peft_model_state_dict(model)) == {"0.lora_A.weight", "0.lora_B.weight"}

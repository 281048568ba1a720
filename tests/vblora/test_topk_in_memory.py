"""An adapter that was loaded from a top-k file holds indices and weights, and can do all but be trained."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import DEVICE, enlarge, outputs, some_ids, tiny_gpt2, tiny_llama
from vblora_triton import PeftModel, VBLoRAConfig, get_peft_model, use_backend
from vblora_triton.checkpoint import adapter_state_dict, write_adapter

FIELDS = {"r": 3, "num_vectors": 300, "vector_length": 16, "topk": 3, "save_only_topk_weights": True}
MIB = 2**20


@pytest.fixture(params=["llama", "gpt2"])
def case(request, tmp_path):
    """What makes the base model, an adapted one, and the folder that its top-k form was saved to."""
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]
    targets = ["q_proj", "v_proj", "down_proj"] if make is tiny_llama else ["c_attn", "mlp.c_proj"]
    model = enlarge(get_peft_model(make(), VBLoRAConfig(**FIELDS, target_modules=targets))).eval()
    model.save_pretrained(tmp_path / "topk")
    model.peft_config["default"].save_only_topk_weights = False
    model.save_pretrained(tmp_path / "full")
    return make, model, tmp_path


def bytes_of(model, *parts: str) -> int:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.numel() * t.element_size() for name, t in tensors if any(part in name for part in parts))


def shapes_of_llama_2_7b() -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def test_llama_2_7b_takes_two_mebibytes_and_not_three_hundred(tmp_path):
    """All linears, r 4, h 2048, b 256, k 2: a bank of 2 MiB, and 39,040 pieces of A and B."""
    config = VBLoRAConfig(
        num_vectors=2048, vector_length=256, topk=2, target_modules="all-linear", save_only_topk_weights=True
    )
    model = get_peft_model(shapes_of_llama_2_7b(), config)
    assert round(bytes_of(model, "vblora_") / MIB) == 307
    assert round(model.get_nb_savable_parameters()[0] * 4 / MIB, 1) == 2.3
    file = {}
    for key, t in model.base_model.adapter_tensors("default").items():
        if "bank" in key:
            file[key] = torch.zeros(t.shape)
        else:
            file[f"{key}_topk_indices"] = torch.arange(2, dtype=torch.int16).expand(*t.shape[:-1], 2).contiguous()
            file[f"{key}_topk_weights"] = torch.full((*t.shape[:-1], 1), 0.5)
    write_adapter(tmp_path, file, config.to_json(), "")
    loaded = PeftModel.from_pretrained(shapes_of_llama_2_7b(), tmp_path)
    # In memory the indices are int32 and every weight is there, as the kernels take them.
    assert bytes_of(loaded, "vblora_") == 2048 * 256 * 4 + 39_040 * 2 * (4 + 4) < 2.6 * MIB
    assert not any("logits" in name for name, _ in loaded.named_parameters())


def test_it_holds_no_logits_and_computes_what_they_did(case):
    make, model, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    assert not any("logits" in name for name, _ in again.named_parameters())
    assert any(name.endswith("vblora_topk.default.indices_A") for name, _ in again.named_buffers())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)
    for (name, own), (_, expected) in zip(
        again.base_model.adapted_layers(), model.base_model.adapted_layers(), strict=True
    ):
        delta = own.get_delta_weight("default")
        torch.testing.assert_close(delta, expected.get_delta_weight("default"), rtol=0, atol=1e-6, msg=name)
        torch.testing.assert_close(own._get_lora_matrices("default"), expected._get_lora_matrices("default"))


@pytest.mark.parametrize("training", [False, True])
def test_both_backends_compute_it(case, training):
    make, _, folder = case
    model = PeftModel.from_pretrained(make(), folder / "topk").train(training).to(DEVICE)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with use_backend("reference"):
        expected = outputs(model)
    with use_backend("triton"):
        torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_it_merges_in_both_modes_and_unmerges_to_the_bit(case):
    make, model, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    expected, weights = outputs(model), {k: v.clone() for k, v in again.state_dict().items()}
    for training in (True, False):
        again.train(training)
        again.merge_adapter(safe_merge=True)
        again.unmerge_adapter()
        assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())
    torch.testing.assert_close(outputs(again.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


def test_it_is_saved_again_bit_for_bit_and_counts_what_is_on_disk(case, tmp_path):
    make, model, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    again.save_pretrained(tmp_path / "again")
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder / "topk", tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    model.peft_config["default"].save_only_topk_weights = True
    assert again.get_nb_savable_parameters() == model.get_nb_savable_parameters()
    state = adapter_state_dict(again.base_model, "default", again.state_dict())
    assert all(torch.equal(first[key], state[key]) for key in first)


def test_saving_it_in_full_is_refused_when_that_is_asked(case, tmp_path):
    make, _, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    again.peft_config["default"].save_only_topk_weights = False
    with pytest.raises(ValueError, match="cannot be saved in full"):
        again.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_it_switches_with_others_and_is_never_trained(case):
    make, model, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    targets = model.peft_config["default"].target_modules
    again.add_adapter("other", VBLoRAConfig(r=2, num_vectors=9, vector_length=16, target_modules=targets))
    again.set_adapter("other")
    assert {n.rpartition(".")[2] for n, p in again.named_parameters() if p.requires_grad} == {"other"}
    again.set_adapter("default")
    assert not any(p.requires_grad for p in again.parameters())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="top-k"):
        again.set_requires_grad("default")
    again.delete_adapter("default")
    assert not any("vblora_topk" in name for name in again.state_dict())


def test_the_gradient_passes_through_it(case):
    """To what lies before it: another adapter, or a soft prompt."""
    make, model, folder = case
    gradients = []
    for adapted in (PeftModel.from_pretrained(make(), folder / "topk"), model):
        embedded = adapted.get_input_embeddings()(some_ids()).detach().requires_grad_()
        adapted(inputs_embeds=embedded).logits.square().sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_full_file_fills_it_and_a_topk_file_takes_the_logits_away_again(case):
    make, model, folder = case
    again = PeftModel.from_pretrained(make(), folder / "topk")
    again.load_adapter(folder / "full", "default", is_trainable=True)
    assert torch.equal(outputs(again.eval()), outputs(model))
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "vblora_" in name}
    again.load_adapter(folder / "topk", "default")
    assert not any("logits" in name for name, _ in again.named_parameters())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_the_same(case, copied):
    make, _, folder = case
    model = PeftModel.from_pretrained(make(), folder / "topk")
    again = copied(model)
    assert torch.equal(outputs(again), outputs(model))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_in_bfloat16_it_keeps_its_weights(case):
    make, _, folder = case
    model = PeftModel.from_pretrained(make().to(torch.bfloat16), folder / "topk", autocast_adapter_dtype=False)
    assert model.base_model.vblora_vector_bank["default"].dtype == torch.bfloat16
    dtypes = {name.rpartition(".")[2]: t.dtype for name, t in model.named_buffers() if "vblora_topk" in name}
    assert dtypes == {"indices_A": torch.int32, "weights_A": torch.float32} | {
        "indices_B": torch.int32,
        "weights_B": torch.float32,
    }
    assert torch.isfinite(outputs(model)).all()


def test_logits_cut_to_the_top_k_by_another_writer_become_selections(case, tmp_path):
    """PEFT reads a top-k file into logits of -inf, and writes those where it is told to save in full."""
    make, model, folder = case
    tensors = load_file(folder / "full" / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if "logits" in key:
            floor = tensor.topk(3, dim=-1).values[..., -1:]
            tensors[key] = tensor.masked_fill(tensor < floor, -torch.inf)
    save_file(tensors, folder / "full" / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(make(), folder / "full")
    assert not any("logits" in name for name, _ in again.named_parameters())
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=2e-6)

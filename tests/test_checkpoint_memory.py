"""A loaded adapter is in memory of its own: whatever becomes of its file, and whatever lay beside it there."""

from functools import partial

import pytest
import torch
from torch.utils.serialization import config as torch_load_options

from tests.models import adapted_by, enlarge, outputs, tiny_bert
from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, VeraConfig

FIELDS = {"r": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], "bias": "all"}
BANK = {"num_vectors": 10, "vector_length": 16}
FORMS = {
    "full": partial(VBLoRAConfig, **FIELDS, **BANK),
    "topk": partial(VBLoRAConfig, **FIELDS, **BANK, save_only_topk_weights=True),
    "vera": partial(VeraConfig, **FIELDS),
    "vera-drawn": partial(VeraConfig, **FIELDS, save_projection=False),
}


def adapted(make_config, seed=0, name="default") -> PeftModel:
    """A BERT classifier with an adapter, a head and biases of its own."""
    model = adapted_by(make_config, {}, tiny_bert(), name, seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in key or key.endswith("bias")):
                parameter.normal_(0, 0.1)
    return model


def load_as_new(make_config, folder, autocast) -> PeftModel:
    return PeftModel.from_pretrained(tiny_bert(), folder, autocast_adapter_dtype=autocast)


def load_beside_another(make_config, folder, autocast) -> PeftModel:
    model = enlarge(adapted_by(partial(make_config, bias="none"), {}, tiny_bert(), "first"))
    model.load_adapter(folder, "second", autocast_adapter_dtype=autocast)
    model.set_adapter("second", inference_mode=True)
    return model


def load_over_one(make_config, folder, autocast) -> PeftModel:
    model = adapted(make_config, seed=1)
    model.load_adapter(folder, "default", autocast_adapter_dtype=autocast)
    return model


@pytest.mark.filterwarnings("ignore:`save_projection` is False")
@pytest.mark.parametrize("load", [load_as_new, load_beside_another, load_over_one])
@pytest.mark.parametrize("autocast", [True, False], ids=["float32", "own-dtype"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("make_config", FORMS.values(), ids=FORMS)
def test_a_running_model_does_not_follow_its_file(make_config, file, autocast, load, tmp_path):
    adapted(make_config).save_pretrained(tmp_path, safe_serialization=file.endswith("safetensors"))
    # For those who turned it on for all of torch.load.
    with torch_load_options.patch("load.mmap", True):
        model = load(make_config, tmp_path, autocast)
    tensors = {key: t.clone() for key, t in model.base_model.adapter_tensors(model.active_adapters[0]).items()}
    before = outputs(model)
    size = (tmp_path / file).stat().st_size
    with open(tmp_path / file, "r+b") as copied_over:
        copied_over.write(b"\x3c" * size)
    assert torch.equal(outputs(model), before)
    now = model.base_model.adapter_tensors(model.active_adapters[0])
    assert [key for key in tensors if not torch.equal(now[key], tensors[key])] == []
    # Only now, for a map of a file that became shorter ends the process.
    (tmp_path / file).write_bytes(b"")
    assert torch.equal(outputs(model), before)


def test_two_parameters_that_share_storage_in_a_file_are_apart_in_the_model(tmp_path):
    config = partial(VeraConfig, r=4, target_modules=["query", "value"])
    adapted_by(config, {}, tiny_bert()).save_pretrained(tmp_path, safe_serialization=False)
    stored = torch.load(tmp_path / "adapter_model.bin")
    first, second = [key for key in stored if key.endswith("vera_lambda_d")][:2]
    stored[second] = stored[first]
    torch.save(stored, tmp_path / "adapter_model.bin")
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True)
    own = model.base_model.adapter_tensors("default")
    own[first].detach().fill_(7)
    assert torch.equal(own[second], stored[first])


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_values_are_refused_by_name(change, tmp_path):
    adapted(FORMS["full"]).save_pretrained(tmp_path, safe_serialization=False)
    stored = torch.load(tmp_path / "adapter_model.bin")
    key = next(iter(stored))
    torch.save(stored | {key: change(stored[key])}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model\.bin"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)

"""What would go wrong unseen in models that are split, and who writes them; tests/test_distributed.py trains them."""

import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.models import adapted_by, tiny_llama
from tests.several import METHODS, WRAPPINGS, assert_near, backward, made, own_rows, whole, wrapped_in_layers
from vblora_triton import PeftWarning, VeraConfig, checkpoint, get_peft_model, get_peft_model_state_dict
from vblora_triton.distributed import check_selections, shard


def test_what_zero_3_has_split_is_refused_before_anything_is_written(tmp_path):
    model = get_peft_model(tiny_llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    # As DeepSpeed leaves a parameter between its uses.
    parameter = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b.default")
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 has split .*q_proj.vera_lambda_b.default over the processes; save"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def errors_of_sharded_models(folder):
    """What is said of each thing that would go wrong, and whether the base weights are what they were."""
    model = wrapped_in_layers(made("vblora"))
    half, rounding, more = made("vblora"), made("vblora"), made("vera")
    for layer in half.get_base_model().model.layers:
        fully_shard(layer)
    shard(more)
    more.add_adapter("second", VeraConfig(**METHODS["vera"][1]))
    more.set_adapter("second")
    later = shard(made("vera"))
    later.add_adapter("second", VeraConfig(**METHODS["vera"][1]))
    later.set_adapter("second", inference_mode=True)
    # With gradients on, but nothing that is trained.
    later(input_ids=own_rows())
    later.base_model.set_requires_grad("second")
    reentrant = made("vblora")
    reentrant.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    # In bfloat16, beside adapters in float32: in the group of a block, and in that of the rest.
    block, rest = made("vblora", narrow=True), made("vblora", narrow=True)
    block.get_base_model().model.layers[1].input_layernorm.requires_grad_(True)
    rest.get_base_model().lm_head.requires_grad_(True)
    calls = {
        "layer": shard(made("vera")).get_base_model().model.layers[0].mlp.up_proj.merge,
        "selections": partial(check_selections, model),
        "in block": partial(shard, block),
        "in rest": partial(shard, rest),
        "merge": model.merge_adapter,
        "unload": model.merge_and_unload,
        "delete": partial(model.delete_adapter, "default"),
        "without": model.unload,
        "topk": partial(model.load_adapter, f"{folder}/topk", "default"),
        "half": partial(backward, half, own_rows()),
        "second": partial(backward, more, own_rows()),
        "later": partial(backward, later, own_rows()),
        "policy": partial(shard, made("vblora"), mp_policy=policy),
        "reentrant": partial(backward, DistributedDataParallel(reentrant), own_rows()),
    }
    before, said = {name: whole(t).clone() for name, t in model.state_dict().items()}, {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    after = {name: whole(t) for name, t in model.state_dict().items()}
    said["changed"] = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    # Without `shard`, as accelerate does with mixed precision.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        backward(fully_shard(rounding, mp_policy=policy), own_rows())
    return said | {"rounding": [str(warning.message) for warning in warned if warning.category is PeftWarning]}


def test_what_would_go_wrong_unseen_is_said(pair, tmp_path):
    adapted_by(*METHODS["vblora"], save_only_topk_weights=True).save_pretrained(tmp_path / "topk")
    for said in pair(errors_of_sharded_models, str(tmp_path)):
        assert said["merge"].startswith(
            "TypeError: The model is sharded by FSDP2, and its weights cannot be merged into"
        )
        assert said["unload"] == said["layer"] == said["merge"]
        assert said["selections"].startswith("ValueError: FSDP2 has sharded `model`: its processes hold parts")
        for name, what in (("in block", "LlamaDecoderLayer"), ("in rest", "PeftModel")):
            assert f"of a {what} trains parameters of torch.bfloat16 and torch.float32, and it takes one" in said[name]
        assert said["delete"].startswith("TypeError: The model is sharded by FSDP2, which would put an adapter's")
        assert said["without"].startswith("TypeError: The model is sharded by FSDP2, and its base model alone")
        assert said["topk"].startswith("ValueError: FSDP2 has sharded the logits of adapter 'default'")
        assert said["half"].startswith("RuntimeError: FSDP shards parts of the model, but not base_model.vblora_vector")
        assert "lambda_b.second and" in said["second"]
        assert said["later"] == said["second"]
        assert "leave it out, and load the base model in that dtype" in said["policy"]
        assert "give gradient_checkpointing_kwargs={'use_reentrant': False}, or" in said["reentrant"]
        assert not said["changed"]
        assert len(said["rounding"]) == 1
        assert said["rounding"][0].startswith("FSDP rounds the adapter to torch.bfloat16 in every forward pass")


def saved_by_the_second_process_alone(folder):
    """It shards a model over itself, as one of several groups does that train models of their own."""
    group = dist.new_group([1])
    if dist.get_rank() == 1:
        model = fully_shard(made("vera"), mesh=DeviceMesh.from_group(group, "cpu"))
        model.save_pretrained(folder)
    # Here both processes hold all, as the first of a group each, and one of them writes.
    with patch.object(checkpoint, "write_adapter", wraps=checkpoint.write_adapter) as written:
        WRAPPINGS["hybrid"](made("vera")).save_pretrained(f"{folder}/hybrid")
    dist.barrier()
    return written.call_count


def test_of_a_part_of_the_processes_the_first_writes(pair, tmp_path):
    assert pair(saved_by_the_second_process_alone, str(tmp_path)) == [1, 0]
    for folder in (tmp_path, tmp_path / "hybrid"):
        assert_near(load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(made("vera")))

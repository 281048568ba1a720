"""What other ways to split a model leave behind; FSDP2 on real processes is in tests/test_distributed.py."""

import pytest
import torch

from tests.models import tiny_llama
from vblora_triton import VeraConfig, get_peft_model


def test_what_zero_3_has_split_is_refused_before_anything_is_written(tmp_path):
    model = get_peft_model(tiny_llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    # As DeepSpeed leaves a parameter between its uses.
    parameter = model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b.default")
    parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"ZeRO-3 has split .*q_proj.vera_lambda_b.default over the processes; save"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

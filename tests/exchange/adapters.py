"""Saved adapters of every method, form and kind of layer, with their models."""

from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from tests.models import VOCABULARY, enlarge, outputs, tiny_gpt2, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model

LLAMA = {"target_modules": ["q_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
VBLORA = {"r": 3, "num_vectors": 10, "vector_length": 16, "topk": 3}
# id -> base model, configuration class, its fields.
CASES = {
    "vblora-full-linear": (tiny_llama, VBLoRAConfig, VBLORA | LLAMA),
    "vblora-topk-linear": (tiny_llama, VBLoRAConfig, VBLORA | LLAMA | {"save_only_topk_weights": True}),
    "vblora-full-conv1d": (tiny_gpt2, VBLoRAConfig, VBLORA | GPT2),
    "vblora-topk-conv1d": (tiny_gpt2, VBLoRAConfig, VBLORA | GPT2 | {"save_only_topk_weights": True}),
    "vera-full-linear": (tiny_llama, VeraConfig, {"r": 5} | LLAMA),
    "vera-bare-linear": (tiny_llama, VeraConfig, {"r": 5, "save_projection": False} | LLAMA),
    "vera-full-conv1d": (tiny_gpt2, VeraConfig, {"r": 5} | GPT2),
}


class Saved(NamedTuple):
    """A base model's folder, an adapter's folder, and the logits of the adapted model."""

    base: str
    adapter: str
    logits: torch.Tensor


def save(folder, make_base, make_config, fields, **settings) -> Saved:
    """Save a base model and an adapter for it that changes its logits."""
    plain = make_base()
    plain.save_pretrained(folder / "base", **settings)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = enlarge(get_peft_model(base, make_config(**fields, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(folder / "adapter")
    logits = outputs(model)
    assert (logits - outputs(plain)).abs().max() > 0.01
    assert logits.shape[-1] == VOCABULARY
    return Saved(str(folder / "base"), str(folder / "adapter"), logits)

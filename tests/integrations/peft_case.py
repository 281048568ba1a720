"""Models with adapters by PEFT: the same for both methods, and what they compute."""

import copy
import importlib.util
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import DEVICE, some_ids, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from vblora_triton.kernels.launch import counted

METHODS = ("vblora", "vera")
BOTH = pytest.mark.parametrize("method", METHODS)
ALONE = pytest.mark.parametrize("alone", [False, True], ids=["all of PEFT", "one model"])
# T5 without its ReLU: in 16 bits, which of its units are on is a matter of rounding.
SMOOTH_T5 = partial(tiny_t5, feed_forward_proj="gated-gelu")
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "t5": SMOOTH_T5, "bert": tiny_bert}
# Both attention and what follows it; in GPT-2 all are Conv1D. BERT's have biases.
TARGETS = {
    "llama": ["k_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["EncDecAttention.q", "wi_0"],
    "bert": ["query", "output.dense"],
}


def peft_classes() -> list[Any]:
    """The two classes that patch_peft changes; none where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        return []
    return [importlib.import_module(f"peft.tuners.{method}.layer").Linear for method in METHODS]


def forwards() -> list[Any]:
    return [vars(cls)["forward"] for cls in peft_classes()]


def peft_config(method: str, **changes: Any) -> Any:
    import peft

    if method == "vblora":
        fields = {"r": 3, "num_vectors": 10, "vector_length": 32, "topk": 2}
        return peft.VBLoRAConfig(**fields | changes)
    return peft.VeraConfig(**{"r": 5, "projection_prng_key": 3} | changes)


def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw what the adapters train again, so that they change the outputs by far more than any tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((s for part, s in (("bank", 0.1), ("logits", 2.0), ("lambda", 0.2)) if part in name), None)
            if scale is not None and ("vblora_" in name or "vera_" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def by_peft(
    method: str, family: str = "llama", adapters: int = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A tiny model with one adapter, or with "default" and "other" active together; the adapters are float32."""
    import peft

    changes = {"target_modules": TARGETS[family]} | changes
    model = peft.get_peft_model(MODELS[family]().to(dtype), peft_config(method, **changes))
    if adapters == 2:
        model.add_adapter("other", peft_config(method, **changes))
        model.base_model.set_adapter(["default", "other"])
    return draw(model).eval().to(DEVICE)


def peft_layers(model: nn.Module) -> list[Any]:
    """PEFT's layers of both methods in the model."""
    return [
        module for module in model.modules() if hasattr(module, "base_layer") and hasattr(module, "merged_adapters")
    ]


def logits(model: nn.Module) -> Tensor:
    ids = some_ids().to(DEVICE)
    more = {"decoder_input_ids": ids} if model.config.model_type == "t5" else {}
    return model(input_ids=ids, **more).logits


def results(model: nn.Module) -> dict[str, Tensor]:
    """The logits, and the gradient of everything that is trained and of the embeddings, for fixed weights of them."""
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    model.zero_grad(set_to_none=True)
    y = logits(model)
    (y * fixed(y)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    embeddings.requires_grad_(False)
    return {"logits": y.detach(), **found}


def fixed(y: Tensor) -> Tensor:
    """Weights for a sum over y: other ones in every place, and the same in every call."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y)


def one_layer(method: str, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **changes: Any) -> Any:
    """PEFT's layer of one linear of 96 inputs and 64 outputs."""
    import peft

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 64, bias=False) if base is None else base).to(dtype)
    model = peft.get_peft_model(module, peft_config(method, target_modules=["0"], **changes))
    return draw(model).to(DEVICE).base_model.model[0]


def inputs() -> Tensor:
    """What that layer takes."""
    return torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def runs_kernels(module: nn.Module) -> bool:
    """Whether a call of a model, or of a layer as above, launches kernels of this package."""
    with counted() as launches, torch.no_grad():
        logits(module) if hasattr(module, "config") else module(inputs())
    return bool(launches)


def in_float64(model: nn.Module) -> nn.Module:
    """The same rounded values in float64."""
    return copy.deepcopy(model).double()

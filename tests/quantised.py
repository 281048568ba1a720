"""Quantised base layers and models by the libraries that make them, and how far their formats round."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton.integrations.quantization import weight

FOUR_BITS = ("nf4", "fp4", "nested nf4")
FORMATS = (*FOUR_BITS, "int8", "torchao int8", "torchao fp8")

# bitsandbytes says of each call of an int8 layer that it casts to float16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def torchao_config(name: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if name == "torchao int8" else Float8WeightOnlyConfig()


def quantised_linear(
    name: str, linear: nn.Linear, compute_dtype: torch.dtype | None = None, storage: torch.dtype = torch.uint8
) -> Any:
    """The layer in a format, as its library makes it; on the CPU.

    storage: what 4 bits are packed into; FSDP wants a floating dtype.
    """
    if name.startswith("torchao"):
        from torchao.quantization import quantize_

        holder = nn.Sequential(linear)
        quantize_(holder, torchao_config(name))
        return holder[0]
    import bitsandbytes as bnb

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    if name == "int8":
        layer: Any = bnb.nn.Linear8bitLt(*sizes, bias=has_bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False)
    else:
        nested, kind = name.startswith("nested"), name.split()[-1]
        layer = bnb.nn.Linear4bit(
            *sizes, bias=has_bias, quant_type=kind, compress_statistics=nested, compute_dtype=compute_dtype,
            quant_storage=storage,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data.clone(), quant_type=kind, compress_statistics=nested, quant_storage=storage, module=layer
        )
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    return layer.to("cpu")


def quantised_model(name: str, model: nn.Module, **options: Any) -> Any:
    """Put quantised layers in the place of a model's linear ones, but for its head; in place."""
    for key, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and key != "lm_head":
            parent, _, child = key.rpartition(".")
            setattr(model.get_submodule(parent), child, quantised_linear(name, module, **options))
    return model


def loading(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What from_pretrained takes for a base model in a format."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name.startswith("torchao"):
        return {"quantization_config": TorchAoConfig(torchao_config(name)), "dtype": dtype}
    if name == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": dtype}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name.split()[-1],
        bnb_4bit_use_double_quant=name.startswith("nested"),
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "dtype": dtype}


def dequantised(model: nn.Module) -> nn.Module:
    """Put plain layers in the place of quantised ones, with their weights; in place."""
    for name, module in list(model.named_modules()):
        if "bitsandbytes" in type(module).__module__ and isinstance(module, nn.Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(weight(module), requires_grad=False)
            plain.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


def rounding(name: str, w: Tensor) -> Tensor:
    """How far, at most, a format's values are from a weight (out, in), in float64, element by element.

    4 bit: half the widest gap of the code times the largest of its block of 64; where these are nested, kept in 8 bits
        of their own, half the widest gap of that code besides, times the largest distance of 256 of them from the mean.
    int8: half a step, which is 1/127 of the row's largest for bitsandbytes, after rounding to float16, and 1/127.5 for
        torchao.
    fp8: half of the last of 3 bits, or half the smallest number, 2^-9, of a scale that takes the row's largest to 448.
    """
    w = w.double()
    if name.startswith("torchao"):
        largest = w.abs().amax(1, keepdim=True)
        if name == "torchao int8":
            return (largest / 127.5 * 0.5 * (1 + 1e-4)).expand_as(w)
        return torch.maximum(w.abs() * 2.0**-4, largest / 448 * 2.0**-10) * (1 + 1e-4)
    if name == "int8":
        return w.abs().amax(1, keepdim=True) / 127 * 0.5 * (1 + 2.0**-10) + w.abs() * 2.0**-11
    from bitsandbytes import functional as bnb

    code = bnb.get_4bit_type(name.split()[-1], device="cpu").double().sort().values
    blocks = w.reshape(-1, 64).abs().amax(1)
    bound = code.diff().max() / 2 * blocks
    if name.startswith("nested"):
        nested = bnb.create_dynamic_map().double().sort().values
        distance = (blocks - blocks.mean()).abs()
        bound += nested.diff().max() / 2 * distance.max()
    return (bound * (1 + 1e-5)).repeat_interleave(64).reshape(w.shape)

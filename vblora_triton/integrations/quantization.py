"""Base layers whose weight is quantised: read as a tensor, and written again; adapters know no backend.

    weight(base_layer)              dequantised; of a layer that is not quantised the weight itself
    set_weight(base_layer, W)       rounded to the layer's format, where it had been

What a layer is its type says, and no library is imported before one of its layers is met. bitsandbytes' 4-bit and 8-bit
layers and torchao's int8 and fp8 weights can be read and written. Of any other quantised layer (HQQ, GPTQ, AWQ, quanto,
fp8 of transformers) nothing is known but that it can be called: it is trained around, and not merged into.

Merging prepares the new `Content` of a layer first, which may fail, and then lets the layer hold it, which may not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Up to so many rows the layer is called as a module: its own kernels read the packed weight once, where to make it anew
# writes and reads four times as many bytes. As many rows as a decoding kernel of ours takes; not measured.
FEW_ROWS = 16


class Content(NamedTuple):
    """What a base layer keeps of its weight: the tensor that it holds, and the numbers beside it, by name."""

    data: Tensor
    beside: dict[str, Any]


class Format(NamedTuple):
    """A way to keep a weight, (out, in), in a base layer.

    weight: base layer -> dequantised, floating, memory of its own.
    content: base layer, device -> what it keeps. Of a quantised one by reference: nothing ever writes into these
        tensors. Of a plain one a copy, on that device or, with None, its own.
    quantised: base layer, floating weight -> the same, made of that weight.
    put: base layer, content -> None. Allocates nothing.
    multiplies_in: base layer, dtype of x -> the dtype that its own forward would multiply in; None where it may change.
    """

    weight: Callable[[Any], Tensor]
    content: Callable[[Any, torch.device | None], Content]
    quantised: Callable[[Any, Tensor], Content]
    put: Callable[[Any, Content], None]
    multiplies_in: Callable[[Any, torch.dtype], torch.dtype]


# bitsandbytes, 4 bit. A CPU with AVX512-BF16 repacks the weight when the layer is called to evaluate: another order of
# the bits, and bfloat16 in the place of the scales, in new tensors.


def _state_4bit(layer: Any) -> Any:
    """The scales; a parameter that FSDP made has lost them."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def _unpacked_4bit(layer: Any) -> tuple[Tensor, Any]:
    """The packed weight and its scales in the usual order."""
    from bitsandbytes import functional as bnb

    data, state = layer.weight.data, _state_4bit(layer)
    if getattr(state, "packing_format_for_cpu", False):
        state = copy.copy(state)
        # The scales would be rounded once more.
        state.original_nested = False
        data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    return data, state


def _weight_4bit(layer: Any) -> Tensor:
    from bitsandbytes import functional as bnb

    return bnb.dequantize_4bit(*_unpacked_4bit(layer))


def _content_4bit(layer: Any, device: torch.device | None = None) -> Content:
    data, state = _unpacked_4bit(layer)
    return Content(data, dict(vars(state)))


def _quantised_4bit(layer: Any, weight: Tensor) -> Content:
    from bitsandbytes import functional as bnb

    _, old = _unpacked_4bit(layer)
    if layer.weight.is_cpu and weight.shape[1] % old.blocksize:
        raise ValueError(
            f"bitsandbytes reads 4-bit weights with wrong scales on a CPU where in_features, here {weight.shape[1]}, "
            f"is no multiple of the {old.blocksize} weights of a block: merge on a GPU, or load the base unquantised."
        )
    data, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=old.blocksize,
        compress_statistics=old.nested,
        quant_type=old.quant_type,
        quant_storage=layer.weight.quant_storage,
    )
    state.dtype = old.dtype
    return Content(data, dict(vars(state)))


def _put_4bit(layer: Any, content: Content) -> None:
    state = vars(_state_4bit(layer))
    layer.weight.data = content.data
    state.clear()
    state.update(content.beside)


# bitsandbytes, 8 bit. Before the first call the parameter has the scales, and from then on the layer's state.


def _holder_8bit(layer: Any) -> Any:
    return layer.weight if layer.weight.CB is not None else layer.state


def _weight_8bit(layer: Any) -> Tensor:
    holder = _holder_8bit(layer)
    return holder.CB.float().mul_(holder.SCB.float().unsqueeze(1) / 127)


def _content_8bit(layer: Any, device: torch.device | None = None) -> Content:
    holder = _holder_8bit(layer)
    return Content(holder.CB, {"SCB": holder.SCB})


def _quantised_8bit(layer: Any, weight: Tensor) -> Content:
    from bitsandbytes import functional as bnb

    half = weight.half()
    if not half.isfinite().all():
        raise ValueError(
            "The merged weights have values beyond those of float16, which bitsandbytes makes its int8 of. Nothing was "
            "changed: load the base unquantised to merge."
        )
    data, scales, _ = bnb.int8_vectorwise_quant(half)
    return Content(data, {"SCB": scales})


def _put_8bit(layer: Any, content: Content) -> None:
    holder = _holder_8bit(layer)
    holder.CB = layer.weight.data = content.data
    holder.SCB = content.beside["SCB"]


# torchao: a tensor of its own kind in an nn.Linear.


def _content_torchao(layer: Any, device: torch.device | None = None) -> Content:
    names = [name for name in ("scale", "zero_point") if hasattr(layer.weight, name)]
    return Content(layer.weight.qdata, {name: getattr(layer.weight, name) for name in names})


def _quantised_torchao(layer: Any, weight: Tensor) -> Content:
    from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor

    old = layer.weight
    block = tuple(old.block_size)
    if block == weight.shape:
        granularity: Any = PerTensor()
    elif block[0] == 1:
        granularity = PerRow() if block[1] == weight.shape[1] else PerGroup(block[1])
    else:
        granularity = PerBlock(block)
    if type(old).__name__ == "Int8Tensor":
        options = {"reduce_range": old.reduce_range}
    else:
        options = {"float8_dtype": old.qdata.dtype, "kernel_preference": old.kernel_preference}
    new = type(old).from_hp(weight, granularity=granularity, **options)
    return Content(new.qdata, {name: getattr(new, name) for name in _content_torchao(layer).beside})


def _put_torchao(layer: Any, content: Content) -> None:
    layer.weight.qdata = content.data
    for name, value in content.beside.items():
        setattr(layer.weight, name, value)


def _is_torchao(weight: Any) -> bool:
    """Say whether this is a weight of torchao in int8 or fp8 whose layer does not quantise its input as well."""
    return (
        type(weight).__module__.partition(".")[0] == "torchao"
        and type(weight).__name__ in ("Int8Tensor", "Float8Tensor")
        and weight.act_quant_kwargs is None
        and getattr(weight, "act_pre_scale", None) is None
    )


_4BIT = Format(
    _weight_4bit,
    _content_4bit,
    _quantised_4bit,
    _put_4bit,
    lambda layer, dtype: layer.compute_dtype if layer.compute_type_is_set and layer.compute_dtype else dtype,
)
_8BIT = Format(_weight_8bit, _content_8bit, _quantised_8bit, _put_8bit, lambda layer, dtype: dtype)
_TORCHAO = Format(
    lambda layer: layer.weight.dequantize(),
    _content_torchao,
    _quantised_torchao,
    _put_torchao,
    lambda layer, dtype: layer.weight.dtype,
)


def _put_plain(layer: Any, content: Content) -> None:
    # To write into memory that is there needs none, or none for long: what fails is tried once more.
    try:
        layer.weight.copy_(content.data)
    except Exception:  # whatever a device says when it is short of memory
        layer.weight.copy_(content.data)


# A weight that is not quantised is written in place: others may hold its memory.
_PLAIN = Format(
    lambda layer: layer.weight.detach(),
    lambda layer, device: Content(layer.weight.detach().to(device or layer.weight.device, copy=True), {}),
    lambda layer, weight: Content(weight.to(layer.weight.dtype), {}),
    _put_plain,
    lambda layer, dtype: layer.weight.dtype,
)


def _library_class(layer: Any) -> tuple[type, Format] | None:
    """The class of bitsandbytes that a layer is of, if its weight is quantised by now."""
    for cls in type(layer).__mro__:
        if cls.__module__.partition(".")[0] == "bitsandbytes":
            if cls.__name__ == "Linear4bit" and hasattr(layer.weight, "quant_state"):
                return (cls, _4BIT) if _state_4bit(layer) is not None else None
            if cls.__name__ == "Linear8bitLt":
                known = layer.weight.dtype == torch.int8 and hasattr(layer.weight, "CB")
                return (cls, _8BIT) if known and _holder_8bit(layer).CB is not None else None
    return None


def _quantised_format(layer: Any) -> tuple[type, Format] | None:
    """The class whose forward a layer should have, and its format; None for one that is plain or not known."""
    if _is_torchao(getattr(layer, "weight", None)):
        return nn.Linear, _TORCHAO
    return _library_class(layer)


def _is_plain(weight: Any) -> bool:
    """Say whether a weight is a tensor of numbers that count as they are; one that FSDP shards is."""
    return (
        isinstance(weight, Tensor)
        and weight.dtype in FLOATS
        and (type(weight).__name__ == "DTensor" or not is_traceable_wrapper_subclass(weight))
    )


def is_packed(parameter: Any) -> bool:
    """Say whether a parameter is a quantised weight, whose numbers a cast would take for values."""
    return not _is_plain(parameter) or getattr(parameter, "quant_state", None) is not None


def check_cast(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Check that `fn`, which nn.Module is about to apply to all tensors of a model, casts no quantised weight.

    Raises:
        ValueError: it does; bits that were packed into floating numbers would be lost, and libraries refuse others.
    """
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None or not is_packed(parameter):
                continue
            dtype = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device)).dtype
            if dtype != parameter.dtype:
                raise ValueError(
                    f"The quantised weight of {name or 'the layer'}, a {type(module).__name__}, is kept in "
                    f"{parameter.dtype} and cannot be cast to {dtype}. Nothing was changed: load the base model in "
                    "that dtype, or cast the adapter's parameters alone."
                )


def is_quantised(base_layer: Any) -> bool:
    """Say whether a layer's weight is anything but a tensor of floating numbers."""
    return _quantised_format(base_layer) is not None or not _is_plain(getattr(base_layer, "weight", None))


def _format(base_layer: Any) -> Format:
    found = _quantised_format(base_layer)
    if found is not None:
        return found[1]
    kept = getattr(base_layer, "weight", None)
    if _is_plain(kept):
        return _PLAIN
    kind = type(base_layer)
    what = f"{type(kept).__name__} of {kept.dtype}" if isinstance(kept, Tensor) else "form of its own"
    raise TypeError(
        f"The base layer is a {kind.__module__}.{kind.__qualname__}, whose weight is a {what}: merging into quantised "
        "weights is supported for bitsandbytes in 4 and 8 bit and for torchao's int8 and fp8 of weights alone; load "
        "the base unquantised to merge."
    )


def check_mergeable(base_layer: Any) -> None:
    """Raise TypeError, with the layer's class in it, where its weight cannot be written."""
    _format(base_layer)


def warn_of_rounding(base_layers: Iterable[Any]) -> None:
    """Warn, once for all of them, if merging into these layers rounds weights that are quantised."""
    if any(map(is_quantised, base_layers)):
        warnings.warn(
            "The base weights are quantised: merging rounds them to their format again, so that the merged model's "
            "results differ from the unmerged one's by that rounding.",
            stacklevel=4,
        )


def weight(base_layer: Any) -> Tensor:
    """Return a layer's weight as it stores it, (out, in) as a rule: dequantised where it is quantised.

    Returns:
        floating; of a layer that is not quantised the weight itself, detached.
    Raises:
        TypeError: a format that is not known.
    """
    return _format(base_layer).weight(base_layer)


def quantised(base_layer: Any, new_weight: Tensor) -> Content:
    """Return what the layer would keep of a weight, floating: rounded to its format, or to its dtype.

    Raises:
        TypeError: a format that is not known.
        ValueError: a value that the format cannot hold.
    """
    return _format(base_layer).quantised(base_layer, new_weight)


def content(base_layer: Any, device: torch.device | None = None) -> Content:
    """Return what the layer keeps at present, for `put`: a quantised weight by reference, of a plain one a copy.

    Args:
        device: where the copy is to be; by default where the weight is.
    """
    return _format(base_layer).content(base_layer, device)


def moved(kept: Content, device: torch.device) -> Content:
    """Return content on the device to which its layer has been moved since."""
    if kept.data.device == device:
        return kept
    # What is nested in the scales is moved in place.
    beside = {name: copy.copy(value) if hasattr(value, "to") else value for name, value in kept.beside.items()}
    moves = {name: value.to(device) for name, value in beside.items() if hasattr(value, "to")}
    return Content(kept.data.to(device), beside | {name: value for name, value in moves.items() if value is not None})


def put(base_layer: Any, kept: Content) -> None:
    """Let the layer keep this, made for it before; needs no memory."""
    with torch.no_grad():
        _format(base_layer).put(base_layer, kept)
    if is_quantised(base_layer):
        # A backward pass that was recorded before must not take the new weight for the old one.
        base_layer._times_put = getattr(base_layer, "_times_put", 0) + 1


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in layers that are called to evaluate; put back what is repacked.

    It does so on a CPU with AVX512-BF16: the scales are rounded, and the product with such a weight has no gradient.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
            if getattr(_state_4bit(layer), "packing_format_for_cpu", False):
                put(layer, content(layer))


def set_weight(base_layer: Any, new_weight: Tensor) -> None:
    """Give a layer another weight, floating, in the layout of the one from `weight`; see `quantised` for errors."""
    with torch.no_grad():
        put(base_layer, quantised(base_layer, new_weight))


def product_weight(base_layer: Any, x: Tensor) -> Callable[[], Tensor] | None:
    """Return what makes the weight, (out, in) in x's dtype, whose product with x is what the layer would return.

    None where the layer is called as a module: few rows, another forward, or a product in another dtype than x's. The
    product with a weight of bitsandbytes in 8 bit is more exact than its own, which rounds x to int8 too: on a GPU, and
    on a CPU in evaluation.
    """
    found = _quantised_format(base_layer)
    if found is None:
        return None
    cls, kind = found
    own_forward = getattr(cls, "forward", None)
    # Called to evaluate on such a CPU, bitsandbytes repacks the weight, whose gradients it does not know then.
    repacks = x.is_cpu and getattr(base_layer, "support_avx512bf16_for_cpu", False)
    few = x.numel() <= FEW_ROWS * x.shape[-1] and not repacks
    if few or type(base_layer).forward is not own_forward or kind.multiplies_in(base_layer, x.dtype) != x.dtype:
        return None

    put_before, dtype = getattr(base_layer, "_times_put", 0), x.dtype

    def made() -> Tensor:
        if getattr(base_layer, "_times_put", 0) != put_before:
            raise RuntimeError(
                "The weight of a quantised base layer was changed, as merging does, between forward and backward; call "
                "backward first."
            )
        with torch.no_grad():
            return kind.weight(base_layer).to(dtype)

    return made


def features(module: Any) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a layer that is called Linear, as quantised ones are, or None."""
    if "Linear" not in type(module).__name__ or hasattr(module, "base_layer"):
        return None
    sizes: list[Any] = [
        getattr(module, f"{side}_features", getattr(module, f"{side}features", None)) for side in ("in", "out")
    ]
    return (sizes[0], sizes[1]) if all(type(size) is int and size > 0 for size in sizes) else None


def device_of(module: nn.Module) -> torch.device:
    """Return where a layer is: of one without a `weight` its first tensor says so."""
    kept = getattr(module, "weight", None)
    tensors = [kept] if isinstance(kept, Tensor) else [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")

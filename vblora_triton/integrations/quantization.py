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


class Format:
    """A weight, (out, in), of numbers that count as they are, in a base layer; subclasses keep it otherwise.

    library_class: whose forward the layer has, where nobody has replaced it.
    """

    def __init__(self, layer: Any, library_class: Any = nn.Linear) -> None:
        self.layer, self.library_class = layer, library_class

    def weight(self) -> Tensor:
        """Return it floating; a quantised one in memory of its own."""
        return self.layer.weight.detach()

    def content(self, device: torch.device | None) -> Content:
        """Return what the layer keeps: here a copy, on that device or, with None, its own; else by reference."""
        return Content(self.layer.weight.detach().to(device or self.layer.weight.device, copy=True), {})

    def quantised(self, weight: Tensor) -> Content:
        """Return the same, made of a floating weight."""
        return Content(weight.to(self.layer.weight.dtype), {})

    def put(self, content: Content) -> None:
        """Let the layer keep this; allocates nothing. Here it is written in place: others may hold the memory."""
        # This needs no memory, or none for long: what fails is tried once more.
        try:
            self.layer.weight.copy_(content.data)
        except Exception:  # whatever a device says when it is short of memory
            self.layer.weight.copy_(content.data)

    def multiplies_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the layer multiplies x of this one."""
        return self.layer.weight.dtype


class FourBit(Format):
    """bitsandbytes, 4 bit.

    A CPU with AVX512-BF16 repacks the weight when the layer is called to evaluate: another order of the bits, and
    bfloat16 in the place of the scales, in new tensors.
    """

    def _unpacked(self) -> tuple[Tensor, Any]:
        """The packed weight and its scales in the usual order."""
        from bitsandbytes import functional as bnb

        data, state = self.layer.weight.data, _state_4bit(self.layer)
        if getattr(state, "packing_format_for_cpu", False):
            state = copy.copy(state)
            # The scales would be rounded once more.
            state.original_nested = False
            data, state = bnb._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = state.absmax.T.reshape(-1).float()
        return data, state

    def weight(self) -> Tensor:
        from bitsandbytes import functional as bnb

        return bnb.dequantize_4bit(*self._unpacked())

    def content(self, device: torch.device | None) -> Content:
        data, state = self._unpacked()
        return Content(data, dict(vars(state)))

    def quantised(self, weight: Tensor) -> Content:
        from bitsandbytes import functional as bnb

        _, old = self._unpacked()
        if self.layer.weight.is_cpu and weight.shape[1] % old.blocksize:
            raise ValueError(
                "bitsandbytes reads 4-bit weights with wrong scales on a CPU where in_features, here "
                f"{weight.shape[1]}, is no multiple of the {old.blocksize} weights of a block: merge on a GPU, or load "
                "the base unquantised."
            )
        data, state = bnb.quantize_4bit(
            weight.contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=self.layer.weight.quant_storage,
        )
        state.dtype = old.dtype
        return Content(data, dict(vars(state)))

    def put(self, content: Content) -> None:
        state = vars(_state_4bit(self.layer))
        self.layer.weight.data = content.data
        state.clear()
        state.update(content.beside)

    def multiplies_in(self, dtype: torch.dtype) -> torch.dtype:
        return (self.layer.compute_type_is_set and self.layer.compute_dtype) or dtype


def _state_4bit(layer: Any) -> Any:
    """The scales; a parameter that FSDP made has lost them."""
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


class EightBit(Format):
    """bitsandbytes, 8 bit. Before the first call the parameter has the scales, and from then on the layer's state."""

    @property
    def _holder(self) -> Any:
        return self.layer.weight if self.layer.weight.CB is not None else self.layer.state

    def weight(self) -> Tensor:
        return self._holder.CB.float().mul_(self._holder.SCB.float().unsqueeze(1) / 127)

    def content(self, device: torch.device | None) -> Content:
        return Content(self._holder.CB, {"SCB": self._holder.SCB})

    def quantised(self, weight: Tensor) -> Content:
        from bitsandbytes import functional as bnb

        half = weight.half()
        if not half.isfinite().all():
            raise ValueError(
                "The merged weights have values beyond those of float16, which bitsandbytes makes its int8 of. Nothing "
                "was changed: load the base unquantised to merge."
            )
        data, scales, _ = bnb.int8_vectorwise_quant(half)
        return Content(data, {"SCB": scales})

    def put(self, content: Content) -> None:
        holder = self._holder
        holder.CB = self.layer.weight.data = content.data
        holder.SCB = content.beside["SCB"]

    def multiplies_in(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


class TorchAO(Format):
    """torchao, int8 and fp8: a tensor of its own kind in an nn.Linear."""

    def weight(self) -> Tensor:
        return self.layer.weight.dequantize()

    def content(self, device: torch.device | None) -> Content:
        return _parts(self.layer.weight)

    def quantised(self, weight: Tensor) -> Content:
        from torchao.quantization import PerBlock, PerGroup, PerRow, PerTensor

        old = self.layer.weight
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
        return _parts(type(old).from_hp(weight, granularity=granularity, **options))

    def put(self, content: Content) -> None:
        for name, value in {"qdata": content.data, **content.beside}.items():
            setattr(self.layer.weight, name, value)


def _parts(weight: Any) -> Content:
    names = [name for name in ("scale", "zero_point") if hasattr(weight, name)]
    return Content(weight.qdata, {name: getattr(weight, name) for name in names})


def _quantised_format(layer: Any) -> Format | None:
    """Return the format of a layer whose weight is quantised by now; None for one that is plain or not known.

    torchao's are int8 and fp8 whose layer does not quantise its input as well.
    """
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__module__.partition(".")[0] == "torchao":
        known = type(weight).__name__ in ("Int8Tensor", "Float8Tensor")
        alone = known and weight.act_quant_kwargs is None and getattr(weight, "act_pre_scale", None) is None
        return TorchAO(layer) if alone else None
    for cls in type(layer).__mro__:
        if cls.__module__.partition(".")[0] == "bitsandbytes":
            if cls.__name__ == "Linear4bit" and hasattr(weight, "quant_state"):
                return FourBit(layer, cls) if _state_4bit(layer) is not None else None
            if cls.__name__ == "Linear8bitLt" and hasattr(weight, "CB") and weight.dtype == torch.int8:
                found = EightBit(layer, cls)
                return found if found._holder.CB is not None else None
    return None


def is_plain(weight: Any) -> bool:
    """Say whether a weight is a tensor of numbers that count as they are; one that FSDP shards is."""
    return (
        isinstance(weight, Tensor)
        and weight.dtype in FLOATS
        and getattr(weight, "quant_state", None) is None
        and (type(weight).__name__ == "DTensor" or not is_traceable_wrapper_subclass(weight))
    )


def check_cast(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Raise ValueError if `fn`, which nn.Module is about to apply to all tensors of a model, casts a quantised weight.

    Bits that are packed into floating numbers would be lost, and torchao's layers multiply in no other dtype.
    """
    for name, module in model.named_modules():
        # Scales that the module still has belong to a weight that FSDP holds.
        packed = {"weight"} if getattr(module, "quant_state", None) is not None else set()
        for key, parameter in module._parameters.items():
            if parameter is None or (is_plain(parameter) and key not in packed):
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
    return _quantised_format(base_layer) is not None or not is_plain(getattr(base_layer, "weight", None))


def _format(base_layer: Any) -> Format:
    found = _quantised_format(base_layer)
    if found is not None:
        return found
    kept = getattr(base_layer, "weight", None)
    if is_plain(kept):
        return Format(base_layer)
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
    """Return a layer's weight as it stores it, (out, in) as a rule, floating; of a plain layer itself, detached.

    Raises:
        TypeError: a format that is not known.
    """
    return _format(base_layer).weight()


def quantised(base_layer: Any, new_weight: Tensor) -> Content:
    """Return what the layer would keep of a weight, floating: rounded to its format, or to its dtype.

    Raises:
        TypeError: a format that is not known.
        ValueError: a value that the format cannot hold.
    """
    return _format(base_layer).quantised(new_weight)


def content(base_layer: Any, device: torch.device | None = None) -> Content:
    """Return what the layer keeps at present, for `put`; see `Format.content`."""
    return _format(base_layer).content(device)


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
        _format(base_layer).put(kept)
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
    replaced = type(base_layer).forward is not found.library_class.forward
    # Called to evaluate on such a CPU, bitsandbytes repacks the weight, whose gradients it does not know then.
    repacks = x.is_cpu and getattr(base_layer, "support_avx512bf16_for_cpu", False)
    few = x.numel() <= FEW_ROWS * x.shape[-1] and not repacks
    if few or replaced or found.multiplies_in(x.dtype) != x.dtype:
        return None

    put_before, dtype = getattr(base_layer, "_times_put", 0), x.dtype

    def made() -> Tensor:
        if getattr(base_layer, "_times_put", 0) != put_before:
            raise RuntimeError(
                "The weight of a quantised base layer was changed, as merging does, between forward and backward; call "
                "backward first."
            )
        with torch.no_grad():
            return found.weight().to(dtype)

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

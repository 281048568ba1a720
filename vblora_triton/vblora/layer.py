"""The linear layer of VB-LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton import ops
from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.linear import AdaptedLinear, held
from vblora_triton.tuner.sharding import is_sharded
from vblora_triton.vblora.config import VBLoRAConfig
from vblora_triton.vblora.files import TopkLogits, logits_shapes


class VBLoRALayer(BaseTunerLayer):
    """What a layer keeps for each of its VB-LoRA adapters.

    vblora_logits_A: nn.ParameterDict, adapter -> (r, in/b, num_vectors).
    vblora_logits_B: nn.ParameterDict, adapter -> (out/b, r, num_vectors).
    vblora_vector_bank: nn.ParameterDict, adapter -> (num_vectors, b). The model's; the layer reaches it and does not
        own it, so that it is one parameter of the model, saved, moved and sharded once.
    vblora_topk: nn.ModuleDict, adapter -> TopkLogits, of the adapters that were loaded from top-k files; these have
        nothing in the first two.
    topk: dict, adapter -> int.
    vblora_dropout: nn.ModuleDict, adapter -> nn.Dropout or nn.Identity.

    See `BaseTunerLayer` for the rest.
    """

    adapter_layer_names = ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank")
    shared_layer_names = ("vblora_vector_bank",)
    other_param_names = ("r", "topk", "vblora_dropout", "vblora_topk")
    dropout_name = "vblora_dropout"

    vblora_dropout: nn.ModuleDict
    vblora_logits_A: nn.ParameterDict
    vblora_logits_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, kwargs)
        self.topk: dict[str, int] = {}
        self.vblora_topk = nn.ModuleDict()

    @property
    def vblora_vector_bank(self) -> nn.ParameterDict:
        """The banks of all adapters, adapter -> (num_vectors, vector_length)."""
        return self._shared[0]

    def update_layer(
        self,
        adapter_name: str,
        vblora_vector_bank: nn.ParameterDict,
        r: int,
        topk: int,
        num_vectors: int,
        vector_length: int,
        vblora_dropout: float = 0.0,
        init_logits_std: float = 0.01,
        inference_mode: bool = False,
    ) -> None:
        """Give the layer an adapter, or a new one in place of the one of that name.

        logits ~ normal(0, init_logits_std), float32, drawn on the CPU and moved to the device of the base weight.

        Args:
            vblora_vector_bank: adapter -> bank (num_vectors, vector_length); kept by reference.
            inference_mode: freeze the adapter; otherwise it is trained if it is active.
        Raises:
            ValueError, TypeError: a number out of range, or a `vector_length` that does not divide the layer.
        """
        VBLoRAConfig(  # its checks
            r=r,
            num_vectors=num_vectors,
            vector_length=vector_length,
            topk=topk,
            vblora_dropout=vblora_dropout,
            init_logits_std=init_logits_std,
        )
        for name, size in (("in_features", self.in_features), ("out_features", self.out_features)):
            if size % vector_length:
                raise ValueError(f"`vector_length` is {vector_length}, but `{name}` is {size}; give a divisor of it.")
        shapes = logits_shapes(self.in_features, self.out_features, r, num_vectors, vector_length)
        logits = {}
        for name, shape in zip(self.own_names(), shapes, strict=True):
            logits[name] = self._empty(*shape)
            if not logits[name].is_meta:
                # Without values it would take longest of all that a load does.
                nn.init.normal_(logits[name], 0, init_logits_std)
        self.topk[adapter_name] = topk
        if adapter_name in self.vblora_topk:
            del self.vblora_topk[adapter_name]
        self._hold(adapter_name, r, vblora_dropout, logits, vblora_vector_bank, frozen=inference_mode)

    def is_trainable(self, adapter_name: str) -> bool:
        """Say whether the adapter has its logits, and not only the top-k ones of a small file."""
        return adapter_name not in self.vblora_topk

    def use_topk(self, adapter_name: str, selections: TopkLogits) -> None:
        """Hold these selections of an adapter in place of its logits; it is frozen from now on.

        Raises:
            ValueError: FSDP2 has sharded its logits.
        """
        if adapter_name in self.vblora_logits_A and is_sharded(self.vblora_logits_A[adapter_name]):
            raise ValueError(
                f"FSDP2 has sharded the logits of adapter {adapter_name!r}, which a top-k file cannot replace; load "
                "the file under another name, or one that was saved in full."
            )
        for logits in (self.vblora_logits_A, self.vblora_logits_B):
            if adapter_name in logits:
                del logits[adapter_name]
        self.vblora_topk[adapter_name] = selections
        self.set_requires_grad(adapter_name, False)

    def use_logits(self, adapter_name: str) -> None:
        """Make room for the logits of an adapter, frozen and on the meta device, in place of its selections."""
        shapes = self.full_shapes(adapter_name)
        del self.vblora_topk[adapter_name]
        for logits, shape in zip((self.vblora_logits_A, self.vblora_logits_B), shapes, strict=True):
            logits[adapter_name] = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)

    def full_shapes(self, adapter_name: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return the shapes of an adapter's logits, whether it has them or not."""
        bank = self.vblora_vector_bank[adapter_name]
        return logits_shapes(self.in_features, self.out_features, self.r[adapter_name], *bank.shape)

    def file_names(self, adapter_name: str) -> dict[str, str]:
        """Return name in the file -> name here, of each tensor of an adapter that is this layer's own."""
        if self.is_trainable(adapter_name):
            return super().file_names(adapter_name)
        return {
            f"vblora_logits_{matrix}_topk_{kind}": f"vblora_topk.{adapter_name}.{kind}_{matrix}"
            for matrix in "AB"
            for kind in ("indices", "weights")
        }

    def tensors_of(self, adapter_name: str) -> list[Tensor]:
        """Return everything that an adapter consists of here, the bank included."""
        selections = self.vblora_topk[adapter_name].buffers() if adapter_name in self.vblora_topk else ()
        return [*super().tensors_of(adapter_name), *selections]


class Linear(AdaptedLinear, VBLoRALayer):
    """nn.Linear, or transformers' Conv1D, with VB-LoRA adapters.

    y = base_layer(x) + sum_active dropout(x) A^T B^T
    A[i, t*b:(t+1)*b] = compose(logits_A)[i, t]      B[t*b:(t+1)*b, i] = compose(logits_B)[t, i]

    Args:
        base_layer: the layer; called as a module, so that its hooks run.
        vblora_vector_bank: adapter -> bank (num_vectors, vector_length); kept by reference, not registered.
        adapter_name, r, num_vectors, vector_length, topk, vblora_dropout, init_logits_std: the first adapter; see
            `VBLoRALayer.update_layer`.
        fan_in_fan_out, is_target_conv_1d_layer: taken for PEFT's sake; the base layer's type says how its weight is
            stored.
    Raises:
        ValueError, TypeError: see `VBLoRALayer.update_layer`.
    """

    owns_base = True

    def __init__(
        self,
        base_layer: nn.Module,
        vblora_vector_bank: nn.ParameterDict,
        adapter_name: str,
        r: int,
        num_vectors: int,
        vector_length: int,
        topk: int = 2,
        vblora_dropout: float = 0.0,
        init_logits_std: float = 0.01,
        fan_in_fan_out: bool = False,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        # nn.Linear's own __init__ would make a weight of its own.
        nn.Module.__init__(self)
        VBLoRALayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.update_layer(
            adapter_name, vblora_vector_bank, r, topk, num_vectors, vector_length, vblora_dropout, init_logits_std
        )

    def _add_update(self, adapter: str, x: Tensor, base: Tensor | ops.FrozenLinear) -> Tensor:
        bank, own = held(self._shared[0], adapter), self._modules
        # Of a model that is spread over devices, the one bank is elsewhere for some layers.
        bank = bank if bank.device == x.device else bank.to(x.device)
        p = self._dropout_p(adapter)
        topk: TopkLogits | None = own["vblora_topk"]._modules.get(adapter)  # type: ignore[union-attr, assignment]
        if topk is not None:
            return ops.vblora_linear_selected(
                x, base, *topk.selection(), bank, dropout_p=p, training=True, backend=self.backend
            )
        return ops.vblora_linear(
            x,
            base,
            held(own["vblora_logits_A"], adapter),
            held(own["vblora_logits_B"], adapter),
            bank,
            self.topk[adapter],
            dropout_p=p,
            training=True,
            backend=self.backend,
            together=not (self._forward_pre_hooks or self._forward_hooks),
        )

    def _get_low_rank_matrix(self, logits: Tensor, vblora_vector_bank: Tensor, topk: int) -> Tensor:
        """Mix, for each row of logits (*rows, num_vectors), its top-k bank vectors: (*rows, vector_length)."""
        return ops.compose(logits, vblora_vector_bank, topk, backend=self.backend)

    def _get_lora_matrices(self, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
        """Return A (r, in_features) and B (out_features, r), in the dtype of the bank, or in float32."""
        bank = self.vblora_vector_bank[adapter].to(self.base_device)
        bank = bank.float() if cast_to_fp32 else bank
        if adapter in self.vblora_topk:
            own: TopkLogits = self.vblora_topk[adapter]  # type: ignore[assignment]
            A, B = own.compose(bank)
        else:
            logits = (self.vblora_logits_A[adapter], self.vblora_logits_B[adapter])
            A, B = (
                self._get_low_rank_matrix(t.float() if cast_to_fp32 else t, bank, self.topk[adapter]) for t in logits
            )
        return A.reshape(A.shape[0], -1), B.transpose(1, 2).reshape(-1, B.shape[1])

    def _delta(self, adapter: str) -> Tensor:
        """Return B A, float32, (out_features, in_features)."""
        A, B = self._get_lora_matrices(adapter, cast_to_fp32=True)
        return B @ A


def trained_logits(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the logits of a model that are trained, with the k of their adapter; PEFT's layers have the same names."""
    modules: list[Any] = list(model.modules())
    # An adapter may be called as this attribute is, and so may its nn.Dropout be.
    layers = [module for module in modules if isinstance(getattr(module, "vblora_logits_A", None), nn.ParameterDict)]
    return {
        parameter: module.topk[adapter]
        for module in layers
        for name in ("vblora_logits_A", "vblora_logits_B")
        for adapter, parameter in getattr(module, name).items()
        if parameter.requires_grad
    }

"""The linear layer of VeRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vblora_triton import ops
from vblora_triton.tuner.config import check_int
from vblora_triton.tuner.layer import MergingLayer
from vblora_triton.tuner.linear import AdaptedLinear, may_write
from vblora_triton.vera import input_cache
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.projection import ProjectionDict


class VeraLayer(MergingLayer):
    """What a layer keeps for each of its VeRA adapters.

    vera_lambda_b: nn.ParameterDict, adapter -> (out).
    vera_lambda_d: nn.ParameterDict, adapter -> (r).
    vera_A, vera_B: adapter -> frozen (r, at least in) and (at least out, r). The model's; the layer reaches them and
        does not own them, so that each is one buffer of the model, saved and moved once. It takes the first columns
        of A and the first rows of B.
    r: dict, adapter -> int.
    vera_dropout: nn.ModuleDict, adapter -> nn.Dropout or nn.Identity.
    backend: "auto", "triton" or "reference"; see `ops.use_backend`.
    """

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    shared_layer_names = ("vera_A", "vera_B")
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")

    training: bool

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, kwargs)
        self.r = {}
        self.vera_dropout = nn.ModuleDict()
        self.vera_lambda_b = nn.ParameterDict()
        self.vera_lambda_d = nn.ParameterDict()
        # In a tuple, where nn.Module does not see modules to register. Copying and pickling keep them the model's own.
        self._shared: tuple[ProjectionDict, ProjectionDict] = (ProjectionDict(), ProjectionDict())

    @property
    def vera_A(self) -> ProjectionDict:
        """The A of all adapters, adapter -> (r, at least in_features)."""
        return self._shared[0]

    @property
    def vera_B(self) -> ProjectionDict:
        """The B of all adapters, adapter -> (at least out_features, r)."""
        return self._shared[1]

    def update_layer(
        self,
        adapter_name: str,
        vera_A: ProjectionDict,
        vera_B: ProjectionDict,
        r: int,
        config: VeraConfig,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Give the layer an adapter, or a new one in place of the one of that name.

        lambda_b = 0 and lambda_d = d_initial, float32, on the device of the base weight; see `VeraConfig.init_weights`.

        Args:
            vera_A, vera_B: adapter -> projection, with this adapter's; kept by reference.
            r: rank.
            config: its `vera_dropout`, `d_initial` and `init_weights` count.
            inference_mode: freeze the adapter; otherwise it is trained if it is active.
            kwargs: ignored; callers of other versions give more.
        Raises:
            ValueError, TypeError: `r` out of range, or projections that are missing or do not fit the layer.
        """
        check_int("r", r)
        self._check_projections(adapter_name, vera_A, vera_B, r)
        device = self.weight.device
        # On the CPU, so that a seed gives the same numbers whatever the device; None follows torch.device("meta").
        draw_on = device if device.type == "meta" else None
        start_b = torch.ones(self.out_features, dtype=torch.float32, device=draw_on)
        start_d = torch.empty(r, dtype=torch.float32, device=draw_on)
        if not (config.init_weights or start_d.is_meta):
            start_d.normal_()
        self.r[adapter_name] = r
        self.vera_dropout[adapter_name] = nn.Dropout(config.vera_dropout) if config.vera_dropout > 0 else nn.Identity()
        self.vera_dropout[adapter_name].train(self.training)
        for own, tensor in ((self.vera_lambda_b, start_b), (self.vera_lambda_d, start_d)):
            own[adapter_name] = nn.Parameter(tensor if tensor.is_meta else tensor.to(device))
        self._shared = (vera_A, vera_B)
        if config.init_weights:
            self.reset_vera_parameters(adapter_name, config.d_initial)
        self.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not inference_mode)

    def _check_projections(self, adapter_name: str, vera_A: Any, vera_B: Any, r: int) -> None:
        for name, held in (("vera_A", vera_A), ("vera_B", vera_B)):
            if adapter_name not in held:
                raise ValueError(
                    f"`{name}` has no projection for adapter {adapter_name!r}, but those of {list(held)}; put it in "
                    "first: every adapter has its own."
                )
        A, B = vera_A[adapter_name], vera_B[adapter_name]
        if A.dim() != 2 or A.shape[0] != r or A.shape[1] < self.in_features:
            raise ValueError(
                f"`vera_A` of adapter {adapter_name!r} has shape {tuple(A.shape)}; with `r` = {r} and `in_features` = "
                f"{self.in_features} it must be ({r}, at least {self.in_features})."
            )
        if B.dim() != 2 or B.shape[1] != r or B.shape[0] < self.out_features:
            raise ValueError(
                f"`vera_B` of adapter {adapter_name!r} has shape {tuple(B.shape)}; with `r` = {r} and `out_features` = "
                f"{self.out_features} it must be (at least {self.out_features}, {r})."
            )

    def reset_vera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """Set an adapter back to where it starts: lambda_d = d_initial, and lambda_b = 0, which adds nothing."""
        if adapter_name in self.vera_lambda_d and not self.vera_lambda_d[adapter_name].is_meta:
            with torch.no_grad():
                self.vera_lambda_d[adapter_name].fill_(d_initial)
                self.vera_lambda_b[adapter_name].zero_()

    def available_adapters(self) -> list[str]:
        """Name the adapters that this layer has, in the order in which they came."""
        return list(self.r)


class Linear(AdaptedLinear, VeraLayer):
    """nn.Linear, or transformers' Conv1D, with VeRA adapters.

    y = base_layer(x) + sum_active lambda_b * ((lambda_d * (dropout(x) A[:, :in]^T)) B[:out]^T)

    Args:
        base_layer: the layer; called as a module, so that its hooks run. Its type says how its weight is stored.
        vera_A, vera_B: adapter -> (r, at least in) and (at least out, r); kept by reference, not registered.
        adapter_name: the first adapter.
        config: its configuration; see `VeraLayer.update_layer`.
        r: its rank; by default the configuration's.
        is_target_conv_1d_layer: the base layer is a Conv1D; by default what it is.
    Raises:
        ValueError, TypeError: see `VeraLayer.update_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        vera_A: ProjectionDict,
        vera_B: ProjectionDict,
        adapter_name: str,
        config: VeraConfig,
        r: int | None = None,
        is_target_conv_1d_layer: bool | None = None,
        **kwargs: Any,
    ) -> None:
        # nn.Linear's own __init__ would make a weight of its own.
        nn.Module.__init__(self)
        VeraLayer.__init__(self, base_layer, **kwargs)
        conv = isinstance(base_layer, Conv1D)
        self.fan_in_fan_out = conv
        self.is_target_conv_1d_layer = conv if is_target_conv_1d_layer is None else is_target_conv_1d_layer
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.update_layer(adapter_name, vera_A, vera_B, config.r if r is None else r, config=config)

    def _add_update(self, adapter: str, x: Tensor, base: Tensor) -> Tensor:
        A, B = self._projections(adapter, x.device)
        op = ops.vera_linear_ if may_write(self.base_layer, base) else ops.vera_linear
        lambdas = (self.vera_lambda_b[adapter], self.vera_lambda_d[adapter])
        options = self._op_options(self.vera_dropout[adapter])
        # A hook before the layer may have written into x and left no trace of it.
        plain = not self._forward_pre_hooks and A is self.vera_A[adapter]
        dropped = options["training"] and options["dropout_p"]
        if plain and not dropped and input_cache.may_share(x, base, self.backend):
            projected = input_cache.find(x, A, base)
            if projected is None:
                projected = ops.vera_project(x, A, base, backend=self.backend)
                input_cache.keep(x, A, base, projected)
            options["projected"] = projected
        return op(x, base, *lambdas, A, B, **options)

    def _projections(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        A, B = self.vera_A[adapter], self.vera_B[adapter]
        # Of a model that is spread over devices, the one pair is elsewhere for some layers.
        return (A, B) if A.device == B.device == device else (A.to(device), B.to(device))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return diag(lambda_b) B diag(lambda_d) A, float32, (out_features, in_features), or as the weight is stored.

        Conv1D stores its weight (in_features, out_features).
        """
        # Under autocast the product would be rounded to 16 bits.
        with torch.autocast(self.weight.device.type, enabled=False):
            A, B = self._projections(adapter, self.weight.device)
            lambda_b, lambda_d = self.vera_lambda_b[adapter].float(), self.vera_lambda_d[adapter].float()
            scaled = lambda_b[:, None] * B[: self.out_features].float() * lambda_d
            delta = scaled @ A[:, : self.in_features].float()
        return delta.T if self.fan_in_fan_out else delta

    def __repr__(self) -> str:
        return f"vera.{super().__repr__()}"

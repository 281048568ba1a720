"""The linear layer of VeRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vblora_triton import ops
from vblora_triton.ops import shared_input
from vblora_triton.ops.dispatch import resolve
from vblora_triton.tuner.fields import check_int
from vblora_triton.tuner.layer import BaseTunerLayer
from vblora_triton.tuner.linear import AdaptedLinear, held
from vblora_triton.vera.config import VeraConfig
from vblora_triton.vera.projection import ProjectionDict


class VeraLayer(BaseTunerLayer):
    """What a layer keeps for each of its VeRA adapters.

    vera_lambda_b: nn.ParameterDict, adapter -> (out).
    vera_lambda_d: nn.ParameterDict, adapter -> (r).
    vera_A, vera_B: adapter -> frozen (r, at least in) and (at least out, r). The model's; the layer reaches them and
        does not own them, so that each is one buffer of the model, saved and moved once. It takes the first columns
        of A and the first rows of B.
    vera_dropout: nn.ModuleDict, adapter -> nn.Dropout or nn.Identity.

    See `BaseTunerLayer` for the rest.
    """

    adapter_layer_names = ("vera_lambda_b", "vera_lambda_d")
    shared_layer_names = ("vera_A", "vera_B")
    other_param_names = ("vera_A", "vera_B", "vera_dropout", "r")
    dropout_name = "vera_dropout"

    vera_dropout: nn.ModuleDict
    vera_lambda_b: nn.ParameterDict
    vera_lambda_d: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self._wrap(base_layer, kwargs)
        self._shared = (ProjectionDict(), ProjectionDict())

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
        lambda_b, lambda_d = self._empty(self.out_features), self._empty(r)
        if not lambda_d.is_meta:
            lambda_b.fill_(0 if config.init_weights else 1)
            lambda_d.fill_(config.d_initial) if config.init_weights else lambda_d.normal_()
        own = {"vera_lambda_b": lambda_b, "vera_lambda_d": lambda_d}
        self._hold(adapter_name, r, config.vera_dropout, own, vera_A, vera_B, frozen=inference_mode)

    def _check_projections(self, adapter_name: str, vera_A: Any, vera_B: Any, r: int) -> None:
        for name, given, label, dim in (("vera_A", vera_A, "in_features", 1), ("vera_B", vera_B, "out_features", 0)):
            if adapter_name not in given:
                raise ValueError(
                    f"`{name}` has no projection for adapter {adapter_name!r}, but those of {list(given)}; put it in "
                    "first: every adapter has its own."
                )
            shape, least = tuple(given[adapter_name].shape), getattr(self, label)
            if len(shape) != 2 or shape[1 - dim] != r or shape[dim] < least:
                wanted = f"({r}, at least {least})" if dim else f"(at least {least}, {r})"
                raise ValueError(
                    f"`{name}` of adapter {adapter_name!r} has shape {shape}; with `r` = {r} and `{label}` = {least} "
                    f"it must be {wanted}."
                )

    def reset_vera_parameters(self, adapter_name: str, d_initial: float = 0.1) -> None:
        """Set an adapter back to where it starts: lambda_d = d_initial, and lambda_b = 0, which adds nothing."""
        if adapter_name in self.vera_lambda_d and not self.vera_lambda_d[adapter_name].is_meta:
            with torch.no_grad():
                self.vera_lambda_d[adapter_name].fill_(d_initial)
                self.vera_lambda_b[adapter_name].zero_()


class Linear(AdaptedLinear, VeraLayer):
    """nn.Linear, or transformers' Conv1D, with VeRA adapters.

    y = base_layer(x) + sum_active lambda_b * ((lambda_d * (dropout(x) A[:, :in]^T)) B[:out]^T)

    Args:
        base_layer: the layer; called as a module, so that its hooks run. Its type says how its weight is stored.
        vera_A, vera_B: adapter -> (r, at least in) and (at least out, r); kept by reference, not registered.
        adapter_name: the first adapter.
        config: its configuration; see `VeraLayer.update_layer`.
        r: its rank; by default the configuration's.
    Raises:
        ValueError, TypeError: see `VeraLayer.update_layer`.
    """

    owns_base = True

    def __init__(
        self,
        base_layer: nn.Module,
        vera_A: ProjectionDict,
        vera_B: ProjectionDict,
        adapter_name: str,
        config: VeraConfig,
        r: int | None = None,
        **kwargs: Any,
    ) -> None:
        # nn.Linear's own __init__ would make a weight of its own.
        nn.Module.__init__(self)
        VeraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.update_layer(adapter_name, vera_A, vera_B, config.r if r is None else r, config=config)

    def _add_update(self, adapter: str, x: Tensor, base: Tensor | ops.FrozenLinear) -> Tensor:
        A, B = self._projections(adapter, x.device)
        p, projected = self._dropout_p(adapter), None
        # On a CPU PyTorch computes, which has no use for it, unless it was told to run the kernels; and a hook before
        # the layer may have written into x and left no trace of it.
        if (
            p == 0
            and not (x.is_cpu and resolve(self.backend) != "triton")
            and not self._forward_pre_hooks
            and A is self.vera_A[adapter]
            and shared_input.may_share_values(x, base)
        ):
            dtype = base.dtype if isinstance(base, Tensor) else x.dtype
            known, projected = shared_input.find_value(x, A, dtype)
            if not known:
                projected = ops.vera_project(x, A, base, backend=self.backend)
                shared_input.keep_value(A, dtype, projected)
        return ops.vera_linear(
            x,
            base,
            held(self._modules["vera_lambda_b"], adapter),
            held(self._modules["vera_lambda_d"], adapter),
            A,
            B,
            dropout_p=p,
            training=True,
            backend=self.backend,
            projected=projected,
        )

    def _projections(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        A, B = self.vera_A[adapter], self.vera_B[adapter]
        # Of a model that is spread over devices, the one pair is elsewhere for some layers.
        return (A, B) if A.device == B.device == device else (A.to(device), B.to(device))

    def _delta(self, adapter: str) -> Tensor:
        """Return diag(lambda_b) B diag(lambda_d) A, float32, (out_features, in_features)."""
        A, B = self._projections(adapter, self.base_device)
        lambda_b, lambda_d = self.vera_lambda_b[adapter].float(), self.vera_lambda_d[adapter].float()
        scaled = lambda_b[:, None] * B[: self.out_features].float() * lambda_d
        return scaled @ A[:, : self.in_features].float()

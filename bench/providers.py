"""Who is measured: the base alone, this package's layers, PEFT's, in the ways that users run them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.cases import Case
from bench.device import Machine
from bench.workloads import draw_adapter

# The linears of the suite `layer` that are also measured compiled.
COMPILED = ("llama2_7b_q", "tiny")
Adapt = Callable[[Case, nn.Module], nn.Module]


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    adapt: makes the adapted model from a copy of the base.
    run: "eager", "autocast" (bf16), "compiled" or "graph" (a CUDA graph).
    same_function: it computes the case's method, so that its results are judged by the definition's; else by its own in
        a wide dtype.
    suites: where it takes part.
    """

    name: str
    adapt: Adapt
    run: str = "eager"
    same_function: bool = True
    suites: tuple[str, ...] = ("layer", "block", "decode", "model")

    def takes_part(self, case: Case, direction: str) -> bool:
        """Say whether measuring this case by this provider makes sense."""
        if self.run == "autocast" and case.dtype != "bf16":
            return False
        # A compilation takes longer than all else; in the long suite once for each method says enough.
        if self.run == "compiled" and case.suite == "layer" and case.shape not in COMPILED:
            return False
        # An optimizer's step in a graph wants another optimizer.
        return case.suite in self.suites and not (self.run == "graph" and direction == "step")


def alone(case: Case, base: nn.Module) -> nn.Module:
    return base


def ours(backend: str) -> Adapt:
    """This package's adapter, its layers told which backend to use."""

    def adapt(case: Case, base: nn.Module) -> nn.Module:
        import vblora_triton

        common: dict[str, Any] = {"r": case.r, "target_modules": list(case.targets)}
        if case.method == "vera":
            if not hasattr(vblora_triton, "VeraConfig"):
                raise UnavailableError("vblora_triton has no VeraConfig")
            config: Any = vblora_triton.VeraConfig(**common)
        else:
            config = vblora_triton.VBLoRAConfig(**common, num_vectors=case.h, vector_length=case.b, topk=case.k)
        model = vblora_triton.get_peft_model(base, config)
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        draw_adapter(model)
        return model

    return adapt


def peft_config(case: Case) -> Any:
    """PEFT's configuration of the case's method."""
    if importlib.util.find_spec("peft") is None:
        raise UnavailableError("peft is not installed")
    import peft

    common: dict[str, Any] = {"r": case.r, "target_modules": list(case.targets)}
    if case.method == "vera":
        return peft.VeraConfig(**common)
    return peft.VBLoRAConfig(**common, num_vectors=case.h, vector_length=case.b, topk=case.k)


def _by_peft(base: nn.Module, config: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    draw_adapter(model)
    return model


def by_peft(case: Case, base: nn.Module) -> nn.Module:
    return _by_peft(base, peft_config(case))


def patched(case: Case, base: nn.Module) -> nn.Module:
    """PEFT's model after this package's `patch_peft`."""
    config = peft_config(case)
    try:
        from vblora_triton.integrations.peft import patch_peft
    except ImportError as error:
        raise UnavailableError(f"vblora_triton.patch_peft is missing ({error})") from error
    model = _by_peft(base, config)
    patch_peft(model)
    return model


def lora(r: int | None) -> Adapt:
    """PEFT's LoRA; of the rank of the case where `r` is None."""

    def adapt(case: Case, base: nn.Module) -> nn.Module:
        peft_config(case)
        import peft

        rank = case.r if r is None else r
        return _by_peft(base, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(case.targets)))

    return adapt


EAGER_PEFT = "peft"
BASE = "base"
REFERENCE = "ours_reference"
PATCHED_PEFT = "peft_patched"
PROVIDERS = (
    Provider(BASE, alone, same_function=False),
    Provider("ours", ours("triton")),
    Provider("ours_graph", ours("triton"), run="graph"),
    Provider("ours_compiled", ours("triton"), run="compiled"),
    Provider(REFERENCE, ours("reference")),
    Provider(EAGER_PEFT, by_peft),
    Provider("peft_graph", by_peft, run="graph", suites=("decode",)),
    Provider("peft_autocast", by_peft, run="autocast"),
    Provider("peft_compiled", by_peft, run="compiled"),
    Provider(PATCHED_PEFT, patched),
    Provider("base_graph", alone, run="graph", same_function=False, suites=("decode",)),
    Provider("lora", lora(None), same_function=False),
    Provider("lora_r32", lora(32), same_function=False),
)


def ready(provider: Provider, case: Case, model: nn.Module, machine: Machine) -> nn.Module:
    """The model as the provider runs it. A graph is captured later, of the whole call."""
    if provider.run == "compiled":
        return machine.compiled(model)
    if provider.run == "autocast":
        return Autocast(model, machine.device.type)
    return model


class Autocast(nn.Module):
    """A model under bf16 autocast."""

    def __init__(self, model: nn.Module, device_type: str) -> None:
        super().__init__()
        self._orig_mod = model
        self._device_type = device_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device_type, torch.bfloat16):
            return self._orig_mod(*args, **kwargs)

"""Who is measured: the base alone, this package's layers, PEFT's, in the ways that users run them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import vblora_triton
from bench.cases import Case
from bench.device import Device
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


def config_of(library: Any, case: Case, **changes: Any) -> Any:
    """The configuration of the case's method by PEFT or by this package, whose names are the same."""
    common = {"r": case.r, "target_modules": case.target_modules()} | changes
    if case.method == "vera":
        return library.VeraConfig(**common)
    return library.VBLoRAConfig(**common, num_vectors=case.h, vector_length=case.b, topk=case.k)


def ours(backend: str, **changes: Any) -> Adapt:
    """This package's adapter, its layers told which backend to use."""

    def adapt(case: Case, base: nn.Module) -> nn.Module:
        model = vblora_triton.get_peft_model(base, config_of(vblora_triton, case, **changes))
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        draw_adapter(model)
        return model

    return adapt


def peft_library() -> Any:
    """PEFT, which a GPU's machine may lack."""
    if importlib.util.find_spec("peft") is None:
        raise UnavailableError("peft is not installed")
    import peft

    return peft


def peft_adapter(make_config: Callable[[Any, Case], Any] = config_of) -> Adapt:
    """PEFT's adapter by the configuration that `make_config` makes of the library and the case."""

    def adapt(case: Case, base: nn.Module) -> nn.Module:
        peft = peft_library()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(base, make_config(peft, case))
        draw_adapter(model)
        return model

    return adapt


by_peft = peft_adapter()


def patched(case: Case, base: nn.Module) -> nn.Module:
    """PEFT's model after this package's `patch_peft`."""
    model = by_peft(case, base)
    vblora_triton.patch_peft(model)
    return model


def lora(r: int | None) -> Adapt:
    """PEFT's LoRA; of the rank of the case where `r` is None."""

    def config(peft: Any, case: Case) -> Any:
        rank = case.r if r is None else r
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=case.target_modules())

    return peft_adapter(config)


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


def ready(provider: Provider, model: nn.Module, device: Device) -> nn.Module:
    """The model as the provider runs it. A graph is captured later, of the whole call."""
    if provider.run == "compiled":
        return device.compiled(model)
    if provider.run == "autocast":
        model.forward = torch.autocast(device.torch_device.type, torch.bfloat16)(model.forward)
    return model

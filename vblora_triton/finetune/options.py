"""What a run is asked for, and whether it can be done: everything is checked before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from vblora_triton.finetune.base import PRETRAINING_STEPS, Base, as_input_error, check_fits, embedded_base, named_base
from vblora_triton.finetune.data import InputError, Sequences, python_source, read_texts, split
from vblora_triton.finetune.method import METHODS, Method
from vblora_triton.finetune.output import check_output
from vblora_triton.peft_model import get_peft_model

# A vector_length that is chosen for the user. A short one makes as many logits as a layer has weights.
LONGEST, SHORTEST = 256, 16


@dataclass(frozen=True)
class Options:
    """What `vblora-triton finetune` was asked for; None leaves the choice to the run (see the command's help)."""

    output: str
    model: str | None = None
    data: tuple[str, ...] = ()
    method: str = "vblora"
    r: int | None = None
    num_vectors: int | None = None
    vector_length: int | None = None
    topk: int | None = None
    projection_prng_key: int | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    steps: int = 250
    pretraining_steps: int = PRETRAINING_STEPS
    batch_size: int = 16
    seq_len: int = 128
    lr: float | None = None
    vector_bank_lr: float | None = None
    logits_lr: float | None = None
    lambda_lr: float | None = None
    seed: int = 0
    backend: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class Plan:
    """A run whose every input has been checked.

    rates: of the adapter's parts, by the names that `parameter_groups` has.
    layers: name -> (in_features, out_features) of the layers to adapt.
    """

    options: Options
    method: Method
    output: Path
    base: Base
    sequences: Sequences
    config: Any
    rates: dict[str, float]
    layers: dict[str, tuple[int, int]]
    device: torch.device
    dtype: torch.dtype
    backend: str


def check(options: Options) -> Plan:
    """Check everything that can be wrong before training starts, the cheap things first.

    Raises:
        InputError: the first thing found; it names the option and a way out.
    """
    method, chosen = METHODS[options.method], _chosen(options)
    targets = options.target_modules
    with as_input_error(""):
        config: Any = method.config_class(
            # A vector_length that any layer takes, until the layers are known.
            **{
                name: int(chosen[name]) or 1 if name == "vector_length" else int(chosen[name]) for name in method.fields
            },
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
    texts = read_texts(options.data) if options.data else python_source()
    output = Path(options.output).expanduser()
    check_output(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _check_dtype(options, device)
    backend = _check_backend(options.backend, method, config, device, dtype)
    base = embedded_base() if options.model is None else named_base(options.model)
    tokens = base.encode(texts)
    sequences = split(tokens, options.seq_len, "--data" if options.data else "The default text")
    check_fits(base, tokens, options.seq_len)
    with as_input_error(""):
        layers = _layers_to_adapt(base, config)
    if options.vector_length is None and "vector_length" in chosen:
        config = replace(config, vector_length=_longest_vector(layers))
    return Plan(
        options,
        method,
        output,
        base,
        sequences,
        config,
        rates={name: chosen[name] for name in method.rates},
        layers=layers,
        device=device,
        dtype=dtype,
        backend=backend,
    )


def _chosen(options: Options) -> dict[str, float]:
    """Return the method's options, with its defaults for those that were not given.

    Raises:
        InputError: an option of another method was given.
    """
    method = METHODS[options.method]
    defaults = {**method.fields, **method.rates}
    for name, other in METHODS.items():
        stray = [option for option in (*other.fields, *other.rates) if option not in defaults]
        given = [f"--{option.replace('_', '-')}" for option in stray if getattr(options, option) is not None]
        if given:
            raise InputError(
                f"{given[0]} is an option of {other.title}, but --method is {options.method}; leave it out, or give "
                f"--method {name}."
            )
    if options.model is None:
        defaults.update(method.embedded)
    if options.lr is not None:
        defaults.update(dict.fromkeys(method.rates, options.lr))
    given_values = {name: getattr(options, name) for name in defaults}
    return {name: default if given_values[name] is None else given_values[name] for name, default in defaults.items()}


def _layers_to_adapt(base: Base, config: Any) -> dict[str, tuple[int, int]]:
    """Adapt the model without its weights, which checks targets and sizes, and return the layers' sizes."""
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(base.config), config)
    return {name: (layer.in_features, layer.out_features) for name, layer in model.base_model.layers()}


def _longest_vector(layers: dict[str, tuple[int, int]]) -> int:
    common = math.gcd(*(size for sizes in layers.values() for size in sizes))
    length = max(b for b in range(1, LONGEST + 1) if common % b == 0)
    if length < SHORTEST:
        raise InputError(
            f"No vector_length of at least {SHORTEST} divides every targeted layer (their sizes have only {common} in "
            "common); leave some out with --target-modules, or insist with --vector-length."
        )
    return length


class _Watched(TorchDispatchMode):
    """Notes whether an operator of this package, that is a kernel, runs."""

    kernel_ran = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernel_ran |= func.namespace == "vblora_triton"
        return func(*args, **(kwargs or {}))


def _check_backend(backend: str, method: Method, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that will run, "triton" or "reference", having made it run on a layer of 16 x 16."""
    with as_input_error("--"), torch.no_grad(), _Watched() as watched:
        method.probe(torch.ones(1, 16, device=device, dtype=dtype), config, backend)
    return "triton" if watched.kernel_ran else "reference"


def _check_dtype(options: Options, device: torch.device) -> torch.dtype:
    """Return the base model's dtype, having made sure that this machine computes in it."""
    name = options.dtype
    if name is None:
        # A model of the user's is stored in 16 bits nowadays, and on a GPU there is no reason to widen it.
        wide = options.model is None or device.type == "cpu" or not torch.cuda.is_bf16_supported()
        name = "float32" if wide else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    try:
        probe = nn.Linear(8, 8, device=device, dtype=dtype)
        loss = nn.functional.layer_norm(probe(torch.ones(2, 8, device=device, dtype=dtype)), (8,)).float().sum()
        loss.backward()
    except RuntimeError as error:
        raise InputError(f"--dtype {name} does not work on {device} here ({error}); use float32.") from None
    return dtype

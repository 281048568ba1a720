"""What a run is asked for, and whether it can be done: everything is checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from vblora_triton.errors import InputError
from vblora_triton.finetune.base import PRETRAINING_STEPS, Base, as_input_error, check_fits, embedded_base, named_base
from vblora_triton.finetune.data import Sequences, python_source, read_texts, split
from vblora_triton.finetune.output import check_output
from vblora_triton.methods import methods
from vblora_triton.ops import backends_that_run, use_backend
from vblora_triton.peft_model import get_peft_model
from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.method import Method

_COMMON: dict[str, Any] = {
    "model": None,
    "data": (),
    "method": "vblora",
    "target_modules": "all-linear",
    "steps": 250,
    "pretraining_steps": PRETRAINING_STEPS,
    "batch_size": 16,
    "seq_len": 128,
    "lr": None,
    "seed": 0,
    "backend": "auto",
    "dtype": None,
}


class Options(SimpleNamespace):
    """What `vblora-triton finetune` was asked for; None leaves the choice to the run (see the command's help).

    Args:
        output: the folder for the results.
        given: the command's other options by their names, those of every method included (`r`, `lambda_lr`, ...).
    Raises:
        TypeError: there is no such option.
    """

    def __init__(self, output: str, **given: Any) -> None:
        own = [name for method in methods().values() for name in (*method.options, *method.rates)]
        known = {**_COMMON, **dict.fromkeys(own)}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(f"`{unknown[0]}` is no option; there are {', '.join(known)}.")
        super().__init__(output=output, **known | given)


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
    method, chosen = methods()[options.method], _chosen(options)
    targets = options.target_modules
    with as_input_error(""):
        make: Any = PeftConfig.known[options.method.upper()]
        config = make(
            **{name: chosen[name] for name in method.options},
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
        given = [name for name in method.options if getattr(options, name) is not None]
        config = replace(config, **_fitted(method, layers, given))
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


def _chosen(options: Options) -> dict[str, Any]:
    """Return the method's options, with its defaults for those that were not given.

    Raises:
        InputError: an option of another method was given.
    """
    method = methods()[options.method]
    own: dict[str, Any] = {**method.options, **method.rates}
    for name, other in methods().items():
        stray = [option for option in (*other.options, *other.rates) if option not in own]
        given = [f"--{option.replace('_', '-')}" for option in stray if getattr(options, option) is not None]
        if given:
            raise InputError(
                f"{given[0]} is an option of {other.title}, but --method is {options.method}; leave it out, or give "
                f"--method {name}."
            )
    chosen = {}
    for name, option in own.items():
        asked = getattr(options, name)
        if asked is None and name in method.rates:
            asked = options.lr
        usual = option.small if options.model is None and option.small is not None else option.default
        chosen[name] = usual if asked is None else asked
    return chosen


def _layers_to_adapt(base: Base, config: Any) -> dict[str, tuple[int, int]]:
    """Adapt the model without its weights, which checks targets and sizes, and return the layers' sizes."""
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(base.config), config)
    return {name: (layer.in_features, layer.out_features) for name, layer in model.base_model.adapted_layers()}


def _fitted(method: Method, layers: dict[str, tuple[int, int]], given: Sequence[str] = ()) -> dict[str, int]:
    """Choose the options that depend on the layers' sizes, but for those that were given."""
    return {name: option.fit(layers) for name, option in method.options.items() if option.fit and name not in given}


def _check_backend(backend: str, method: Method, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that will run, having made it run on a layer of 16 x 16."""
    layers = {"0": (16, 16)}
    model = nn.Sequential(nn.Linear(16, 16, device=device, dtype=dtype))
    config = replace(config, target_modules=list(layers), task_type=None, **_fitted(method, layers))
    adapted = get_peft_model(model, config)
    with as_input_error("--"), torch.no_grad(), use_backend(backend), backends_that_run() as ran:
        adapted(torch.ones(1, 16, device=device, dtype=dtype))
    # A method may be plain PyTorch that calls none of our ops.
    return ran.pop() if ran else "reference"


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

"""What a run is asked for, and whether it can be done: everything is checked before anything is trained."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import get_available_reporting_integrations

from vblora_triton.errors import InputError
from vblora_triton.finetune.base import (
    PRETRAINING_STEPS,
    Base,
    as_broken_model,
    as_input_error,
    check_fits,
    embedded_base,
    named_base,
)
from vblora_triton.finetune.checkpoints import check_checkpoints
from vblora_triton.finetune.data import Sequences, python_source
from vblora_triton.finetune.examples import make_sequences, read_data
from vblora_triton.finetune.output import check_output
from vblora_triton.finetune.processes import check_processes, is_main, own_device
from vblora_triton.methods import methods, tuner_class
from vblora_triton.ops import backends_that_run, use_backend
from vblora_triton.peft_model import get_peft_model
from vblora_triton.tuner.config import PeftConfig
from vblora_triton.tuner.method import Method

_COMMON: dict[str, Any] = {
    "model": None,
    "data": (),
    "eval_data": (),
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
    "load_in_4bit": False,
    "resume": False,
    "checkpoint_every": None,
    "report_to": (),
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
    left_out: how many examples have no part of an answer among their first tokens.
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
    left_out: int


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
    data = read_data(options.data) if options.data else (python_source(), [])
    held_out = read_data(options.eval_data, "--eval-data") if options.eval_data else None
    check_processes(options.batch_size)
    output = Path(options.output).expanduser()
    check_checkpoints(output, options)
    _check_reports(options.report_to)
    if options.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("--load-in-4bit needs bitsandbytes: pip install 'vblora-triton[bnb]'; or leave it out.")
    if is_main():
        check_output(output)
    device = own_device()
    dtype = _check_dtype(options, device)
    backend = _check_backend(options.backend, method, config, device, dtype)
    base = embedded_base() if options.model is None else named_base(options.model)
    with as_broken_model(f"The data cannot be laid out for {base.title}: "):
        sequences, left_out = make_sequences(
            data, held_out, base.encode, base.tokenizer, base.title, options.seq_len,
            "--data" if options.data else "The default text",
        )  # fmt: skip
    for tokens in (sequences.train, sequences.held_out):
        check_fits(base, tokens.flatten(), options.seq_len)
    # Without values, which checks that there can be such a model.
    with as_broken_model(f"--model {base.title} cannot be loaded: "), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(base.config)
    with as_input_error(""):
        layers = _layers_to_adapt(model, config)
        given = [name for name in method.options if getattr(options, name) is not None]
        config = replace(config, **_fitted(method, layers, given))
        _check_memory(model, config, 0.5 if options.load_in_4bit else dtype.itemsize, device)
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
        left_out=left_out,
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


def _layers_to_adapt(model: nn.Module, config: Any) -> dict[str, tuple[int, int]]:
    """Return the sizes of the layers to adapt in a model, which checks targets and sizes."""
    return tuner_class(config).plan(config, model).features()


def _check_memory(model: nn.Module, config: Any, weight_bytes: float, device: torch.device) -> None:
    """Check that the weights of base model and adapter are no larger than all the memory that there is.

    Args:
        weight_bytes: what a weight of the base model takes at least.
    Raises:
        InputError: they are; it says how many bytes are wanted, and how many there are.
    """
    tuner = tuner_class(config)
    base = int(weight_bytes * sum(parameter.numel() for parameter in model.parameters()))
    adapter = 4 * sum(math.prod(shape) for shape in tuner.file_shapes(tuner.plan(config, model)).values())
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    if base + adapter > there:
        where = "this machine" if device.type == "cpu" else "the GPU"
        sizes = ", ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in config.method.options)
        raise InputError(
            f"The base model's weights take {base:,} bytes and the adapter's {adapter:,} ({sizes}), but {where} has "
            f"{there:,} bytes of memory; make them smaller."
        )


def _check_reports(names: Sequence[str]) -> None:
    """Check that what the losses are to be reported to is known to Trainer and installed."""
    there = get_available_reporting_integrations()
    for name in names:
        if name not in there:
            raise InputError(
                f"--report-to {name} is not known or not installed; there are {', '.join(there) or 'none'} here, and "
                f"`pip install {name}` may bring it."
            )


def _fitted(method: Method, layers: dict[str, tuple[int, int]], given: Sequence[str] = ()) -> dict[str, int]:
    """Choose the options that depend on the layers' sizes, but for those that were given."""
    return {name: option.fit(layers) for name, option in method.options.items() if option.fit and name not in given}


def _check_backend(backend: str, method: Method, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that will run, having made it run on a layer of 16 x 16."""
    layers = {"0": (16, 16)}
    model = nn.Sequential(nn.Linear(16, 16, device=device, dtype=dtype))
    # No larger than any machine holds: whether this one holds what is asked for is looked at with the model.
    sizes = {name: min(getattr(config, name), 1024) for name in method.options} | _fitted(method, layers)
    config = replace(config, target_modules=list(layers), task_type=None, **sizes)
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

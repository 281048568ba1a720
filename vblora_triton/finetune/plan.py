"""What a run is asked for, and whether it can be done: everything is checked before anything is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from vblora_triton import ops
from vblora_triton.finetune.base import PRETRAINING_STEPS, Base, as_input_error, check_fits, embedded_base, named_base
from vblora_triton.finetune.data import InputError, Sequences, python_source, read_texts, split
from vblora_triton.finetune.output import check_output
from vblora_triton.peft_model import get_peft_model
from vblora_triton.vblora.config import VBLoRAConfig

# What an option is when it is not given: for a model of the user's (the paper's rates), and for the small embedded one,
# whose bank would outweigh its logits, and whose loss falls by 17 % in 250 steps with these rates, 8 % with those.
NAMED = {"num_vectors": 256, "vector_bank_lr": 1e-3, "logits_lr": 1e-2}
EMBEDDED = {"num_vectors": 64, "vector_bank_lr": 1e-2, "logits_lr": 1e-1}

# A vector_length that is chosen for the user. A short one makes as many logits as a layer has weights.
LONGEST, SHORTEST = 256, 16


@dataclass(frozen=True)
class Options:
    """What `vblora-triton finetune` was asked for; None leaves the choice to the run (see the command's help)."""

    output: str
    model: str | None = None
    data: tuple[str, ...] = ()
    method: str = "vblora"
    r: int = 4
    num_vectors: int | None = None
    vector_length: int | None = None
    topk: int = 2
    target_modules: str | tuple[str, ...] = "all-linear"
    steps: int = 250
    pretraining_steps: int = PRETRAINING_STEPS
    batch_size: int = 16
    seq_len: int = 128
    lr: float | None = None
    vector_bank_lr: float | None = None
    logits_lr: float | None = None
    seed: int = 0
    backend: str = "auto"
    dtype: str | None = None


@dataclass(frozen=True)
class Plan:
    """A run whose every input has been checked.

    layers: name -> (in_features, out_features) of the layers to adapt.
    """

    options: Options
    output: Path
    base: Base
    sequences: Sequences
    config: VBLoRAConfig
    vector_bank_lr: float
    logits_lr: float
    layers: dict[str, tuple[int, int]]
    device: torch.device
    dtype: torch.dtype
    backend: str


def check(options: Options) -> Plan:
    """Check everything that can be wrong before training starts, the cheap things first.

    Raises:
        InputError: the first thing found; it names the option and a way out.
    """
    targets, defaults = options.target_modules, EMBEDDED if options.model is None else NAMED
    with as_input_error(""):
        config = VBLoRAConfig(
            r=options.r,
            num_vectors=options.num_vectors or int(defaults["num_vectors"]),
            vector_length=options.vector_length or 1,
            topk=options.topk,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        )
    texts = read_texts(options.data) if options.data else python_source()
    output = Path(options.output).expanduser()
    check_output(output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _check_dtype(options, device)
    backend = _check_backend(options.backend, config, device, dtype)
    base = embedded_base() if options.model is None else named_base(options.model)
    tokens = base.encode(texts)
    sequences = split(tokens, options.seq_len, "--data" if options.data else "The default text")
    check_fits(base, tokens, options.seq_len)
    with as_input_error(""):
        layers = _layers_to_adapt(base, config)
    if options.vector_length is None:
        config = replace(config, vector_length=_longest_vector(layers))
    return Plan(
        options,
        output,
        base,
        sequences,
        config,
        vector_bank_lr=options.vector_bank_lr or options.lr or defaults["vector_bank_lr"],
        logits_lr=options.logits_lr or options.lr or defaults["logits_lr"],
        layers=layers,
        device=device,
        dtype=dtype,
        backend=backend,
    )


def _layers_to_adapt(base: Base, config: VBLoRAConfig) -> dict[str, tuple[int, int]]:
    """Adapt the model without its weights, which checks targets and sizes, and return the layers' sizes."""
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(base.config), config)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if hasattr(module, "vblora_logits_A")
    }


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


def _check_backend(backend: str, config: VBLoRAConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that will run, "triton" or "reference", having made it run on a layer of 16 x 16."""
    x = torch.ones(1, 16, device=device, dtype=dtype)
    logits_A, logits_B = torch.ones(2, config.r, config.num_vectors, device=device).unsqueeze(2).unbind()
    bank = torch.ones(config.num_vectors, 16, device=device)
    with as_input_error("--"), torch.no_grad(), _Watched() as watched:
        ops.vblora_linear(x, None, logits_A, logits_B.transpose(0, 1), bank, config.topk, backend=backend)
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

"""The suite `load`: what saving and loading each form of file takes, and how large it is."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vblora_triton
from bench import correctness
from bench.cases import DIRECTIONS, MODELS, Case
from bench.device import Call, Device
from bench.providers import Adapt, config_of, lora, ours, peft_adapter, peft_library
from bench.records import Record
from bench.runner import Effort, blank, enter_times, interleaved, noting, paired_ratio
from bench.workloads import sharing_copy

Load = Callable[[nn.Module], object]
# Of logits after loading, against those before saving: top-k weights are rounded on disk, and in 16 bits what has
# changed by little may be rounded to a neighbour.
LIMIT = {"fp32": 1e-4, "bf16": 5e-2}


def forms(case: Case) -> dict[str, Adapt]:
    """The adapters of the case's method that each library writes in a form of its own, and LoRA to compare with."""
    kinds: dict[str, dict[str, Any]] = {"full": {}, "topk": {"save_only_topk_weights": True}}
    if case.method == "vera":
        kinds = {"projections": {"save_projection": True}, "no_projections": {"save_projection": False}}
    made = {}
    for kind, changes in kinds.items():
        made[f"peft_{kind}"] = peft_adapter(partial(config_of, **changes))
        made[f"ours_{kind}"] = ours("auto", **changes)
    return made | {"lora_r32": lora(32)}


def _logits(model: nn.Module, case: Case) -> Tensor:
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % MODELS[case.shape]["vocab_size"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def _judged(case: Case, adapt: Adapt, library: Any, base: nn.Module, folder: Path, pair: list[Record]) -> list[Load]:
    """What saves the adapter and what loads it, both functions of a fresh base; its size and error go to the records.

    Raises:
        WrongError: what was loaded computes something else.
    """
    model: Any = adapt(case, sharing_copy(base))
    before = _logits(model, case)

    def save(fresh: nn.Module) -> None:
        model.save_pretrained(str(folder))

    def load(fresh: nn.Module) -> nn.Module:
        return library.PeftModel.from_pretrained(fresh, str(folder))

    save(base)
    loaded = _logits(load(sharing_copy(base)), case)
    found = correctness.errors({"logits after loading": loaded}, {"logits after loading": before})
    for record in pair:
        (record.max_rel_err,) = found.values()
        record.bytes_on_disk = (folder / "adapter_model.safetensors").stat().st_size
    correctness.check(found, dict.fromkeys(found, LIMIT[case.dtype]))
    return [save, load]


def measure_files(case: Case, device: Device, effort: Effort, base: nn.Module) -> list[Record]:
    """Save and load a case in every form, turn by turn: two records for each form, first all of saving."""
    records: dict[str, list[Record]] = {}
    calls: dict[str, Call] = {}
    # from_pretrained changes the model that it is given: each run has a fresh one, made outside the time.
    fresh = base

    def prepare() -> None:
        nonlocal fresh
        fresh = sharing_copy(base)

    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder, warnings.catch_warnings():
        # PEFT and this package warn about files without projections.
        warnings.simplefilter("ignore")
        for form, adapt in forms(case).items():
            pair = records[form] = [blank(case, what, form) for what in DIRECTIONS["load"]]
            with noting(pair):
                library = vblora_triton if form.startswith("ours_") else peft_library()
                made: dict[str, Call] = {}
                works = _judged(case, adapt, library, base, Path(folder, form), pair)
                for record, work in zip(pair, works, strict=True):
                    call = made[f"{record.direction}/{form}"] = lambda i, work=work: work(fresh)  # type: ignore[misc]
                    prepare()
                    peak = device.peak_bytes(call)
                    record.peak_mib = None if peak is None else peak / 2**20
                calls |= made
        times = interleaved(calls, device, replace(effort, most=min(effort.most, 20)), prepare)
    ordered = [record for both in zip(*records.values(), strict=True) for record in both]
    for record in ordered:
        values = times.get(f"{record.direction}/{record.provider}")
        if values is not None:
            enter_times(record, values)
            # The same form by PEFT; LoRA has no other.
            rival = times.get(f"{record.direction}/peft_{record.provider.partition('_')[2]}")
            record.ratio_to_peft = paired_ratio(values, rival) if rival is not None else None
    return ordered

"""The suite `load`: what saving and loading each form of file takes, and how large it is."""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import correctness
from bench.cases import MODELS, Case
from bench.device import Machine
from bench.providers import UnavailableError, lora, ours, peft_config
from bench.records import Record
from bench.runner import Effort, blank, paired_ratio, quantile
from bench.workloads import draw_adapter, sharing_copy

# Of logits after loading, against those before saving.
LIMIT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


@dataclass(frozen=True)
class Form:
    """One library's way to write a method.

    library: "ours" or "peft".
    changes: fields of the configuration.
    """

    name: str
    library: str
    changes: dict[str, Any]
    lora_rank: int | None = None


def forms(case: Case) -> list[Form]:
    """The forms of a case's method, by either library, and LoRA's file to compare with."""
    if case.method == "vera":
        kinds = {"projections": {"save_projection": True}, "no_projections": {"save_projection": False}}
    else:
        kinds = {"full": {}, "topk": {"save_only_topk_weights": True}}
    made = [Form(f"{library}_{kind}", library, kinds[kind]) for kind in kinds for library in ("peft", "ours")]
    return [*made, Form("lora_r32", "peft", {}, lora_rank=32)]


def _adapted(case: Case, form: Form, base: nn.Module) -> nn.Module:
    if form.lora_rank is not None:
        return lora(form.lora_rank)(case, base)
    if form.library == "ours":
        model = ours("auto")(case, base)
    else:
        # First: it says so where there is no peft.
        config = peft_config(case)
        import peft

        model = peft.get_peft_model(base, config)
        draw_adapter(model)
    for field, value in form.changes.items():
        setattr(model.peft_config["default"], field, value)  # type: ignore[union-attr,index,arg-type]
    return model


def _loader(form: Form) -> Any:
    if form.library == "ours":
        from vblora_triton import PeftModel
    else:
        from peft import PeftModel
    return PeftModel


def open_form(
    case: Case, form: Form, base: nn.Module, folder: Path
) -> tuple[Callable[[], object], Callable[[], nn.Module]]:
    """Adapt a copy of the base; return what saves it to the folder, and what loads it from there onto another copy."""
    model = _adapted(case, form, sharing_copy(base))

    def load() -> nn.Module:
        return _loader(form).from_pretrained(sharing_copy(base), str(folder))

    return lambda: model.save_pretrained(str(folder)), load  # type: ignore[operator]


def _logits(model: nn.Module, case: Case, device: torch.device) -> Tensor:
    ids = torch.arange(8, device=device)[None] % MODELS[case.shape]["vocab_size"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


class FileMeasurement:
    """Save and load one case in every form, turn by turn."""

    def __init__(self, case: Case, machine: Machine, effort: Effort, base: nn.Module) -> None:
        self.case, self.machine, self.effort, self.base = case, machine, effort, base

    def run(self) -> list[Record]:
        """Two records for each form: one for saving, one for loading."""
        folder = Path(tempfile.mkdtemp(prefix="bench-load-"))
        records: dict[str, list[Record]] = {}
        entrants: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
        try:
            with warnings.catch_warnings():
                # PEFT and this package warn about files without projections.
                warnings.simplefilter("ignore")
                for form in forms(self.case):
                    records[form.name] = [blank(self.case, what, form.name) for what in ("save", "load")]
                    self._enter(form, folder / form.name, records[form.name], entrants)
                self._time(records, entrants)
        finally:
            shutil.rmtree(folder)
        return [pair[j] for j in (0, 1) for pair in records.values()]

    def _enter(self, form: Form, folder: Path, pair: list[Record], entrants: dict) -> None:
        try:
            model = _adapted(self.case, form, sharing_copy(self.base))
            before = _logits(model, self.case, self.machine.device)
            model.save_pretrained(str(folder))  # type: ignore[operator]
            loaded = _loader(form).from_pretrained(sharing_copy(self.base), str(folder))
            error = correctness.relative_error(_logits(loaded, self.case, self.machine.device), before)
        except UnavailableError as problem:
            status, reason = "unavailable", str(problem)
        except Exception as problem:
            # One library's failure is a result; the others are still to be measured.
            status, reason = "failed", f"{type(problem).__name__}: {problem}"[:500]
        else:
            right = error <= LIMIT[self.case.dtype]
            status, reason = ("ok", None) if right else ("wrong", f"logits after loading: relative error {error:.1e}")
            for record in pair:
                record.max_rel_err = error
                record.bytes_on_disk = (folder / "adapter_model.safetensors").stat().st_size
        for record in pair:
            record.status, record.reason = status, reason
        if status != "ok":
            return

        def load() -> object:
            return _loader(form).from_pretrained(self._fresh, str(folder))

        entrants[form.name] = (lambda: model.save_pretrained(str(folder)), load)  # type: ignore[operator]
        self._fresh = sharing_copy(self.base)
        for record, work in zip(pair, entrants[form.name], strict=True):
            peak = self.machine.peak_bytes(lambda i, work=work: work())  # type: ignore[misc]
            record.peak_mib = None if peak is None else peak / 2**20

    def _time(self, records: dict[str, list[Record]], entrants: dict) -> None:
        times: dict[tuple[str, int], list[float]] = {(name, j): [] for name in entrants for j in (0, 1)}
        runs = max(self.effort.least, min(self.effort.most, 20))
        for _ in range(runs):
            for (name, j), values in times.items():
                # from_pretrained changes the model that it is given: each run has a fresh one, made outside the time.
                self._fresh = sharing_copy(self.base)
                self.machine.synchronize()
                start = time.perf_counter()
                entrants[name][j]()
                self.machine.synchronize()
                values.append((time.perf_counter() - start) * 1e3)
        for (name, j), values in times.items():
            record = records[name][j]
            record.runs = len(values)
            record.q20_ms, record.median_ms, record.q80_ms = (quantile(values, q) for q in (0.2, 0.5, 0.8))
            # The same form by PEFT; LoRA has no other.
            rival = ("peft_" + name.partition("_")[2], j)
            if rival in times:
                record.ratio_to_peft = paired_ratio(values, times[rival])

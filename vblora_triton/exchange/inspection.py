"""What is in an adapter's folder, for a reader and for a program."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from vblora_triton.exchange.stored import StoredAdapter, read_stored
from vblora_triton.methods import tuner_class
from vblora_triton.tuner.config import PeftConfig, replacing

# Fields that are said elsewhere, or say nothing of the adapter.
_UNSAID = {"peft_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def inspect_adapter(
    adapter: str | os.PathLike,
    base: str | os.PathLike | nn.Module | None = None,
    *,
    plot: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Say what is in an adapter's folder.

    Args:
        adapter, base: see `read_stored`.
        plot: write a picture of how often each bank vector is selected to this file; needs matplotlib.
    Returns:
        Ready for JSON. "adapter", "peft_type", "method" (its title), "base_model", "checked_against_base",
        "trainable_further", "parameters" (elements of all tensors of the file), "bytes" (of the weights' file),
        "settings" (the configuration), "modules" (name -> [in_features, out_features], None where the file does not
        tell), "beside" (names of tensors that are not the method's: modules trained whole, biases), and "values": what
        the method says of its own; see its `facts`.
    Raises:
        AdapterFileError: a broken adapter.
        ValueError: a base model that cannot be read or does not fit; `plot` of an adapter without a bank.
        ImportError: `plot`, and matplotlib is not installed.
    """
    stored = read_stored(adapter, base)
    facts = stored.method.facts(stored.config, stored.tensors)
    if plot is not None:
        _plot(facts, Path(plot))
    settings = {name: value for name, value in vars(stored.config).items() if name not in _UNSAID}
    return {
        "adapter": str(stored.folder),
        "peft_type": stored.config.peft_type.value,
        "method": stored.config.method.title,
        "base_model": stored.config.base_model_name_or_path,
        "checked_against_base": stored.base is not None,
        "trainable_further": stored.trainable,
        "parameters": _parameters(stored),
        "bytes": stored.file.stat().st_size,
        "settings": {name: _plain(settings[name]) for name in sorted(settings)},
        "modules": {
            name: [sizes.in_features if sizes.exact else None, sizes.out_features]
            for name, sizes in stored.layers.items()
        },
        "beside": sorted(key.removeprefix("base_model.model.") for key in stored.beside()),
        "values": facts,
    }


def inspection_lines(report: dict[str, Any]) -> list[str]:
    """Return the lines in which a terminal shows what `inspect_adapter` returned."""
    method = tuner_class(PeftConfig.known[report["peft_type"]]())
    settings = report["settings"]
    sizes = [settings.get(name) for name in ("r", "num_vectors", "vector_length", "topk")]
    names = [f"{letter} {size}" for letter, size in zip("rhbk", sizes, strict=True) if size is not None]
    checked = "checked against it" if report["checked_against_base"] else "not here, so not checked against it"
    further = "yes" if report["trainable_further"] else "no: to use and to merge"
    kinds = Counter(name.rpartition(".")[2] for name in report["modules"])
    lines = [
        f"{report['method']} adapter in {report['adapter']}",
        f"  base model         {report['base_model'] or '(not named)'} ({checked})",
        f"  sizes              {', '.join(names)}",
        f"  adapted layers     {len(report['modules'])}: {', '.join(f'{n} {name}' for name, n in kinds.items())}",
        f"  parameters         {report['parameters']:,d}",
        f"  bytes              {report['bytes']:,d}",
        f"  trainable further  {further}",
    ]
    if report["beside"]:
        lines.append(f"  trained whole      {', '.join(report['beside'])}")
    return [*lines, "", *method.fact_lines(report["values"])]


def _parameters(stored: StoredAdapter) -> int:
    """Count the elements of the tensors of the file; what is drawn again from a key is not in it."""
    packed = stored.method.pack(stored.config, {key: tensor.to("meta") for key, tensor in stored.tensors.items()})
    return sum(tensor.numel() for tensor in packed.values())


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _plot(facts: dict[str, Any], path: Path) -> None:
    if "counts" not in facts:
        raise ValueError("`plot` shows how often bank vectors are selected, and this adapter has no vector bank.")
    import matplotlib
    from matplotlib.figure import Figure

    suffix = path.suffix.removeprefix(".") or "png"
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(facts["counts"])), facts["counts"], width=1.0)
    axes.set(xlabel="vector of the bank", ylabel="selections", xlim=(-0.5, len(facts["counts"]) - 0.5))
    supported = figure.canvas.get_supported_filetypes()
    if suffix not in supported:
        raise ValueError(f"`plot` is {str(path)!r}; matplotlib {matplotlib.__version__} writes {', '.join(supported)}.")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=suffix)

"""Adapters merged into their base model on disk: shard by shard, in the memory of one, and resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vblora_triton import checkpoint, hub
from vblora_triton.errors import InputError
from vblora_triton.exchange import shards
from vblora_triton.exchange.output import check_new
from vblora_triton.exchange.shards import Place, Shards
from vblora_triton.exchange.stored import StoredAdapter, read_stored
from vblora_triton.peft_model import PeftModel
from vblora_triton.tuner.config import PeftConfig, replacing
from vblora_triton.tuner.file_keys import live_bias_name
from vblora_triton.tuner.layer import ModulesToSaveWrapper
from vblora_triton.tuner.merging import check_alone
from vblora_triton.tuner.model import BaseTuner

_STATE = "merge.json"
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot)(\.index\.json)?|README.*", re.IGNORECASE)
_TOKENIZER = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece|sentencepiece).*")


class Merged(NamedTuple):
    """What a merge wrote.

    folder: where. shards: how many files of weights, of which `resumed` were there from a run that did not end.
    layers: how many were changed. bytes: of the weights.
    """

    folder: Path
    shards: int
    resumed: int
    layers: int
    bytes: int


def merge_to_folder(
    adapter: str | os.PathLike,
    output: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    progressbar: bool = False,
) -> Merged:
    """Write the base model with the adapter merged into its weights: all that transformers loads.

    The weights are those of `merge_and_unload()`, bit for bit, in the dtype of the base model's files. One tensor is in
    memory at a time. A run that was killed leaves a folder `.NAME.unfinished` beside the output, and the same call goes
    on from there. Tokenizer, generation settings and code are copied; a tokenizer in the adapter's folder wins.

    Args:
        adapter: a folder, or an id on the Hub.
        output: the folder to write, which must be new.
        base: the base model's folder or hub id, saved as safetensors; by default what the adapter's configuration
            names.
        progressbar: show one.
    Raises:
        AdapterFileError: a broken adapter; nothing was written.
        InputError: `output` exists, a base model that cannot be read or is quantised, or a full disk.
        ValueError: the adapter does not fit the base model, or the result would not be finite.
    """
    target = check_new(output)
    source = _base_folder(adapter, base)
    stored = read_stored(adapter, source)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if settings.get("quantization_config"):
        raise InputError(f"The base model in {source} is quantised; give the unquantised one.")
    old = Shards(source)
    change = _Change(stored, old)
    state = _fingerprint(stored, old)
    work = target.absolute().parent / f".{target.name}.unfinished"
    _begin(work, state, old.bytes)
    done = 0
    try:
        with _bar(len(change.layers), progressbar) as bar:
            for file in old.files:
                places = {name: place for name, place in old.places.items() if place.file == file}
                new = work / change.new_name(file)
                if new.is_file():
                    done += 1
                    bar.update(len(places.keys() & change.layers.keys()))
                else:
                    shards.write_like(file, new, places, lambda name: change.tensor(name, bar))
        _finish(work, source, stored, old, change, settings)
        (work / _STATE).unlink()
        if target.is_dir():
            target.rmdir()
        work.replace(target)
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}; run it again to go on.") from error
    written = Shards(target)
    return Merged(target, len(written.files), done, len(change.layers), written.bytes)


class _Change:
    """What the adapter changes in the files of its base model.

    layers: name of a weight in the files -> name of the adapted layer.
    replaced: name in the files -> its new value, of modules trained whole and of biases.
    added: name -> new tensor, or the place of one to copy, of those that the files lack: what was tied no longer is.
    """

    def __init__(self, stored: StoredAdapter, old: Shards) -> None:
        assert stored.base is not None
        self._old, groups = old, _tied(stored.base)
        self._tuner = _on_meta(stored)
        layers = dict(self._tuner.adapted_layers())
        check_alone(stored.base, layers)
        self.layers = {f"{name}.weight": name for name in layers}
        own = dict(_whole(self._tuner, stored.tensors))
        shapes = {name: layers[layer].base_layer.weight.shape for name, layer in self.layers.items()}
        for name, shape in (shapes | {name: own[name].shape for name in own.keys() & old.places.keys()}).items():
            if name not in old.places or old.places[name].shape != tuple(shape):
                raise InputError(
                    f"The base model's files have no {name} of shape {tuple(shape)}: they hold its tensors otherwise "
                    "than the model does. Load the base model, save it again, and merge into that; or use "
                    "merge_and_unload()."
                )
        self.replaced = {name: self._cast(name, tensor) for name, tensor in own.items() if name in old.places}
        self.added: dict[str, Tensor | Place] = {}
        for name in own.keys() - old.places.keys():
            twin = next((other for other in groups.get(name, ()) if other in old.places), None)
            self.added[name] = self._cast(twin, own[name])
        for name, group in groups.items():
            if name not in own and name not in old.places and own.keys() & set(group):
                twin = next(other for other in group if other in old.places)
                self.added[name] = old.places[twin]
        self.unties = bool(own.keys() & groups.keys())

    def _cast(self, like: str | None, tensor: Tensor) -> Tensor:
        dtype = shards.dtype_of(self._old.places[like]) if like else None
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    def new_name(self, file: Path) -> str:
        """Return what the file in place of one of the base model's is called."""
        return shards.FIRST_NAME if self.added and file.name == shards.SINGLE_NAME else file.name

    def tensor(self, name: str, bar: Any) -> Tensor | None:
        """Return the new value of a tensor, or None for one that stays."""
        if name in self.replaced:
            return self.replaced[name]
        if name not in self.layers:
            return None
        layer: Any = self._tuner.model.get_submodule(self.layers[name])
        empty, weight = layer.base_layer.weight, self._old.read(name)
        layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            finite = _add_by_rows(weight, layer.get_delta_weight("default"))
        finally:
            layer.base_layer.weight = empty
        if not finite:
            raise ValueError(
                f"Merging gives {name} values that are not finite in {weight.dtype}; the adapter, or the base model, "
                "is broken."
            )
        bar.update()
        return weight


def _add_by_rows(weight: Tensor, delta: Tensor, rows: int = 64) -> bool:
    """Add a float32 matrix to a weight in place, rounding once; say whether the result is finite.

    The bits are those of all rows at once, in less memory.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    finite = True
    with torch.no_grad():
        for part, added in zip(weight.split(rows), delta.split(rows), strict=True):
            part.copy_(part.to(wide) + added)
            finite = finite and bool(torch.isfinite(part).all())
    return finite


def _base_folder(adapter: str | os.PathLike, base: str | os.PathLike | None) -> Path:
    """Return the folder of the base model, after downloading it if it is an id on the Hub."""
    name = os.fspath(base) if base is not None else None
    if name is None:
        name = PeftConfig.from_pretrained(hub.local_folder(adapter, ())).base_model_name_or_path
    if not name:
        raise InputError("The adapter's configuration does not say what its base model is; give --base MODEL.")
    if Path(name).is_dir():
        return Path(name)
    import huggingface_hub

    try:
        ignored = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "*/*"]
        return Path(huggingface_hub.snapshot_download(name, ignore_patterns=ignored))
    except Exception as error:  # whatever the network raises
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"The base model {name!r} is no folder here, and cannot be downloaded: {type(error).__name__}: {reason}"
        ) from error


def _on_meta(stored: StoredAdapter) -> BaseTuner:
    """Put the adapter, with its values, on the base model without any."""
    heads = PeftModel.class_for(stored.config).task_heads
    tuner = stored.method(stored.base, stored.config, low_cpu_mem_usage=True, heads=heads)  # type: ignore[arg-type]
    checkpoint.fill_adapter(tuner, "default", stored.tensors, autocast_adapter_dtype=True, keep_dtype=False)
    return tuner


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return name -> all names, of the parameters that have several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}


def _whole(tuner: BaseTuner, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Walk what replaces parameters of the base model: modules trained whole, and biases, by their names in it."""
    for name, wrapper in tuner.wrappers():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for key in wrapper.modules_to_save["default"].state_dict():
                yield f"{name}.{key}", tensors[f"base_model.model.{name}.{key}"]
    for name in tuner.trained_biases["default"]:
        live = live_bias_name(tuner.model, name)
        yield live.replace(".base_layer.bias", ".bias"), tensors[f"base_model.model.{name}"]


def _fingerprint(stored: StoredAdapter, old: Shards) -> str:
    """Tell what is merged into what: a run that is taken up again must be of the same."""
    files = [stored.file, stored.folder / checkpoint.CONFIG_NAME]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    base = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in old.files]
    return json.dumps([torch.__version__, hashes, base])


def _begin(work: Path, state: str, size: int) -> None:
    """Make the folder to work in, or find it as a run of the same left it.

    Raises:
        InputError: it cannot be made, or the disk has too little space.
    """
    try:
        if work.is_dir():
            same = (work / _STATE).is_file() and (work / _STATE).read_text(encoding="utf-8") == state
            if not same:
                shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        for left in work.glob(".*.tmp"):
            left.unlink()
        free = shutil.disk_usage(work).free
        need = size - sum(file.stat().st_size for file in work.iterdir())
        if free < need:
            if not (work / _STATE).is_file():
                work.rmdir()
            raise InputError(f"{work.parent} has {free:,d} bytes free, and {need:,d} are needed.")
        with replacing(work / _STATE) as path:
            path.write_text(state, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{work} cannot be made: {error.strerror or error}") from error


def _finish(
    work: Path, source: Path, stored: StoredAdapter, old: Shards, change: _Change, settings: dict[str, Any]
) -> None:
    """Write what is not weights, and the weights that the base model's files lack."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not _WEIGHTS.fullmatch(file.name):
            shutil.copyfile(file, work / file.name)
    if (stored.folder / "tokenizer_config.json").is_file():
        for file in sorted(stored.folder.iterdir()):
            if file.is_file() and _TOKENIZER.fullmatch(file.name):
                shutil.copyfile(file, work / file.name)
    names = {name: change.new_name(place.file) for name, place in old.places.items()}
    if change.added:
        shards.write_added(work / shards.ADDED_NAME, change.added)
        names |= dict.fromkeys(change.added, shards.ADDED_NAME)
    if change.unties:
        settings = _untied(settings)
        _write_json(work / "config.json", settings)
    if len(set(names.values())) > 1:
        total = sum((work / file).stat().st_size for file in set(names.values()))
        _write_json(
            work / shards.INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": {name: names[name] for name in sorted(names)}},
        )


def _untied(settings: Any) -> Any:
    """Return a configuration with `tie_word_embeddings` off, in its parts too where they have it."""
    parts = {name: _untied(value) for name, value in settings.items() if isinstance(value, dict)}
    parts = {name: part if "tie_word_embeddings" in settings[name] else settings[name] for name, part in parts.items()}
    return settings | parts | {"tie_word_embeddings": False}


def _write_json(path: Path, values: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _bar(total: int, progressbar: bool) -> Any:
    from tqdm.auto import tqdm

    # None: not where nobody looks.
    return tqdm(total=total, desc="Merging", unit="layer", disable=None if progressbar else True)

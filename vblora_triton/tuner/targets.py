"""Which modules of a model an adapter is put on: matching by name, and the usual choice for a known architecture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import regex
from torch import nn

from vblora_triton.tuner.layer import BaseTunerLayer, ModulesToSaveWrapper, linear_features

ALL_LINEAR = "all-linear"

# The names that classification and question-answering models of transformers give to their head.
HEAD_NAMES = ("score", "classifier", "qa_outputs")

# The modules that LoRA adapts by default, and the `model_type`s that have them.
_LORA_DEFAULTS: tuple[tuple[list[str] | str, str], ...] = (
    (
        ["q_proj", "v_proj"],
        "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    ),
    (["query", "value"], "bert electra layoutlm roberta xlm-roberta"),
    (["query_key_value"], "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox"),
    (["q", "v"], "mt5 t5"),
    (["q", "v", "q_proj", "v_proj"], "blip-2"),
    (["c_attn"], "gpt2 gpt_bigcode"),
    (["c_proj", "c_attn"], "btlm"),
    (["qkv_proj"], "codegen"),
    (["Wqkv"], "mpt"),
    (["in_proj"], "deberta"),
    (["query_proj", "value_proj"], "deberta-v2"),
    (["q_proj", "v_proj", "fc1", "fc2"], "phi"),
    (["q_proj", "k_proj", "v_proj", "o_proj"], "nemotron_h"),
    (["key", "value", "receptance", "output"], "rwkv"),
    (["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "rwkv7"),
    (r".*language_model\..*\.(q_proj|v_proj)", "gemma4"),
)
LORA_TARGETS: dict[str, list[str] | str] = {
    model_type: targets for targets, model_types in _LORA_DEFAULTS for model_type in model_types.split()
}


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk the modules that the model had before any adapter, under the names they had then.

    A module that an adapter wraps is given as itself, not as its wrapper, and what a wrapper adds is left out.
    """
    inside = None  # the prefix of the last wrapper's parts, which follow it directly
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = name + "."
            yield name, module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            inside = name + "."
            for inner, part in module.original_module.named_modules():
                yield f"{name}.{inner}" if inner else name, part
        elif name:
            yield name, module


# A usual expression takes microseconds, and one that goes astray years.
SECONDS = 1.0


def matches(expression: str, key: str) -> Any:
    """Return the match of an expression with the whole of a module's name, or None.

    Raises:
        ValueError: it cannot be matched, or not in time: an expression comes with the files of whoever wrote them.
    """
    try:
        return regex.fullmatch(expression, key, timeout=SECONDS)
    except TimeoutError:
        raise ValueError(
            f"The regular expression {expression!r} takes more than {SECONDS:g} s to match the one name {key!r}; write "
            "it without nested repetitions, or give a list of names."
        ) from None
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{expression!r} is no regular expression ({error}); give a list of names.") from error


def name_matches(names: Any, key: str) -> bool:
    """Say whether `key` is meant by `names`: a list of whole names or ".suffix"es, or an expression for all of it."""
    if not names:
        return False
    if isinstance(names, str):
        return matches(names, key) is not None
    return key in names or any(key.endswith(f".{name}") for name in names)


def is_excluded(config: Any, key: str) -> bool:
    """Say whether `exclude_modules` names the module, or `modules_to_save` holds it or a part of which it is one."""
    if name_matches(config.exclude_modules, key):
        return True
    parts = key.split(".")
    wholes = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(name_matches(config.modules_to_save, whole) for whole in wholes)


def is_targeted(config: Any, key: str) -> bool:
    """Say whether `target_modules` names the module, in one of the layers of `layers_to_transform`.

    A name given in full is meant as it stands: `layers_to_transform` restricts only what an ending matches.
    """
    if not name_matches(config.target_modules, key):
        return False
    numbers = config.layers_to_transform
    if isinstance(config.target_modules, str) or key in config.target_modules or numbers is None or numbers == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first number counts: the experts of a layer are numbered as well.
        match = matches(rf"(?:|.*?\.)(?:{pattern})\.(?P<number>\d+)\..*?", key)
        if match is not None:
            return int(match["number"]) in ([numbers] if isinstance(numbers, int) else numbers)
    return False


def all_linear_names(model: Any, task_type: str | None = None) -> set[str]:
    """Name every linear layer but the output head, and but those whose owner never calls them.

    A classifier's head is known by its name, and only where the task says that there is one, as in PEFT.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(output, BaseTunerLayer):
        output = output.get_base_layer()
    elif isinstance(output, ModulesToSaveWrapper):
        output = output.original_module
    modules = dict(original_modules(model))
    names = {name for name, module in modules.items() if linear_features(module) and module is not output}
    if output is None and task_type == "SEQ_CLS":
        names = {name for name in names if name.split(".")[0] not in HEAD_NAMES}
    return {name for name in names if not never_called(modules, name)}


def never_called(modules: dict[str, nn.Module], name: str) -> bool:
    """Say whether the module belongs to nn.MultiheadAttention, which reads its weight and never calls it."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def resolve_targets(config: Any, model: nn.Module, defaults: dict[str, list[str] | str]) -> set[str] | str:
    """Return `target_modules` with None and "all-linear" replaced by what they stand for in this model.

    Args:
        defaults: `model_type` -> the usual targets.
    Raises:
        ValueError: None, and the architecture has no default.
    """
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in defaults:
            raise ValueError(
                "Please specify `target_modules` in `peft_config`: `target_modules` is None, and there is no default "
                f"for a model of type {model_type!r}. Give the names of the linear layers to adapt, or 'all-linear'."
            )
        found = defaults[model_type]
        return found if isinstance(found, str) else set(found)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return all_linear_names(model, config.task_type)
    return targets


def find_targets(config: Any, model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules to adapt; `config.target_modules` has been through `resolve_targets`.

    Returns:
        name -> module, in the model's order, with the wrappers of earlier adapters taken off. Not yet checked.
    Raises:
        ValueError: nothing is left to adapt.
    """
    modules = dict(original_modules(model))
    # A reference to the same module under two names is one module; named_modules() gave the first.
    matched = {name: module for name, module in modules.items() if is_targeted(config, name)}
    targets = {name: module for name, module in matched.items() if not is_excluded(config, name)}
    if targets:
        return targets
    asked = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    if matched:
        raise ValueError(
            f"All modules were excluded: `target_modules` {asked} matches only {', '.join(matched)}, which "
            "`exclude_modules` or `modules_to_save` takes away; target others, or exclude fewer."
        )
    where = (
        ""
        if config.layers_to_transform is None
        else (
            f" in the layers {config.layers_to_transform} of `layers_to_transform`"
            + (f" below {config.layers_pattern!r}" if config.layers_pattern else "")
        )
    )
    endings = sorted({name.rpartition(".")[2] for name, module in modules.items() if linear_features(module)})
    raise ValueError(
        f"Target modules {asked} not found in the base model{where}: `target_modules` matches no module. Its linear "
        f"layers are named {', '.join(endings) or '(there are none)'}."
    )


def warn_of_idle_names(names: Any, model: nn.Module, defaults: dict[str, list[str] | str]) -> None:
    """Warn of names, in a list beside others, that match no module: most likely they are mistyped.

    Args:
        defaults: `model_type` -> the usual targets. Those of another architecture are no slip, in a list for several.
    """
    usual = {name for targets in defaults.values() if not isinstance(targets, str) for name in targets}
    keys = [key for key, _ in model.named_modules(remove_duplicate=False)]
    listed = sorted(set(names) - usual) if isinstance(names, (list, set, tuple)) else []
    idle = [name for name in listed if not any(name_matches([name], key) for key in keys)]
    if idle:
        linear = {key.rpartition(".")[2] for key, module in original_modules(model) if linear_features(module)}
        warnings.warn(
            f"`target_modules` names {', '.join(idle)}, which this model does not have, beside others that it has; its "
            f"linear layers are named {', '.join(sorted(linear))}.",
            stacklevel=2,
        )

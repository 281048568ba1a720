"""The model card, README.md, of an adapter's folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from vblora_triton.tuner.config import CONFIG_NAME, replacing

CARD_NAME = "README.md"

# Names that can stand in prose and in code as they are: ids on the Hub.
_PLAIN_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_CODE = """\
```python
from vblora_triton import {auto}

# "." is this folder; elsewhere give its path, or the id that it has on the Hub.
model = {auto}.from_pretrained(".")
```
"""
_CODE_FOR_ANY_BASE = """\
```python
from vblora_triton import PeftModel

# `base_model` is the model that the adapter was made for, loaded; "." is this folder, or give its path or id.
model = PeftModel.from_pretrained(base_model, ".")
```
"""
# What transformers calls a model for a task -> the class that loads it with its adapter.
_TASKS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}


def is_path(name: str) -> bool:
    """Say whether a base model's name is a path on somebody's machine, and so no name to anyone else."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return absolute or name.startswith(("./", "../", ".\\", "..\\", "~")) or name in (".", "..")


def card_fields(config: Any) -> dict[str, Any]:
    """Return the metadata of an adapter's card, as the Hub reads it: base_model, library_name, tags.

    A base model that is a path is left out: it would tell others a folder's name, and them nothing.
    """
    base = config.base_model_name_or_path
    fields: dict[str, Any] = {"base_model": base} if base and not is_path(base) else {}
    # "peft" is what the Hub calls files of this format.
    return fields | {"library_name": "peft", "tags": ["vblora-triton", config.peft_type.value.lower()]}


def model_card(config: Any) -> str:
    """Return a minimal model card for an adapter."""
    base = config.base_model_name_or_path
    task = None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))
    named = bool(base) and _PLAIN_NAME.fullmatch(base) is not None
    code = _CODE.format(auto=f"AutoPeftModel{_TASKS.get(task or '', '')}") if base else _CODE_FOR_ANY_BASE
    text = (
        f"# {config.method.title} adapter\n\n"
        f"An adapter for {f'`{base}`' if named else 'a base model'}; its settings are in `{CONFIG_NAME}`.\n\n{code}"
    )
    return _with_metadata(card_fields(config), text)


def _with_metadata(fields: dict[str, Any], text: str) -> str:
    """Put metadata before a card's text; nothing that a value holds can end the metadata or add to it."""
    metadata = yaml.safe_dump(fields, sort_keys=False, width=10**6, allow_unicode=True)
    if not metadata.replace("\n", "").isprintable():
        # As escapes: some readers take what cannot be seen for the end of a line.
        metadata = yaml.safe_dump(fields, sort_keys=False, width=10**6)
    return f"---\n{metadata}---\n\n{text}"


def update_model_card(folder: Path, config: Any) -> None:
    """Write a card into a folder, or add the metadata of an adapter to the card that is there, keeping its text."""
    path = folder / CARD_NAME
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        from huggingface_hub import ModelCard

        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        there, fields = card.data.to_dict(), card_fields(config)
        tags = dict.fromkeys([*(there.get("tags") or ()), *fields["tags"]])
        text = _with_metadata(there | fields | {"tags": list(tags)}, card.text.lstrip("\n"))
    else:
        text = model_card(config)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

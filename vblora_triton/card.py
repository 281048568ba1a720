"""The model card, README.md, of an adapter's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vblora_triton.tuner.config import CONFIG_NAME, replacing

CARD_NAME = "README.md"


def card_fields(config: Any) -> dict[str, Any]:
    """Return the metadata of an adapter's card, as the Hub reads it: base_model, library_name, tags."""
    base = config.base_model_name_or_path
    fields: dict[str, Any] = {"base_model": base} if base else {}
    # "peft" is what the Hub calls files of this format.
    return fields | {"library_name": "peft", "tags": ["vblora-triton", config.peft_type.value.lower()]}


def model_card(config: Any) -> str:
    """Return a minimal model card for an adapter."""
    base = config.base_model_name_or_path
    fields = card_fields(config)
    tags = fields.pop("tags")
    lines = [
        "---",
        *(f'{name}: "{value}"' if name == "base_model" else f"{name}: {value}" for name, value in fields.items()),
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
        f"# {config.method.title} adapter",
        "",
        f"An adapter for {f'`{base}`' if base else 'a base model'}; its settings are in `{CONFIG_NAME}`.",
        "",
        "```python",
        "from vblora_triton import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, folder)",
        "```",
        "",
    ]
    return "\n".join(lines)


def update_model_card(folder: Path, config: Any) -> None:
    """Write a card into a folder, or add the metadata of an adapter to the card that is there, keeping its text."""
    path = folder / CARD_NAME
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        from huggingface_hub import ModelCard

        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        fields = card_fields(config)
        tags = fields.pop("tags")
        for name, value in fields.items():
            setattr(card.data, name, value)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
        text = str(card)
    else:
        text = model_card(config)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

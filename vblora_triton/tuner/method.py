"""What an adapter method says of itself to the optimizer, the model card and the command; cheap to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Part(NamedTuple):
    """Parameters of an adapter that are trained at a learning rate of their own.

    help: as --help shows it.
    parameters: the attributes of the method's layers, or of its model, that hold them.
    default: the learning rate; `small`: the one for the command's small default model, where it is another.
    default_help: what --help says for `default`.
    """

    help: str
    parameters: tuple[str, ...]
    default: float
    small: float | None = None
    default_help: str | None = None
    metavar: str = "LR"


class Option(NamedTuple):
    """A field of the configuration, a whole number, as an option of the command.

    metavar, help: as --help shows them; `default_help` in place of `default`, where that is not what is meant.
    default: its value; `small`: the one for the command's small default model, where it is another.
    minimum, maximum: of the values that can be.
    fit: chooses the value, where none is asked for, from {name: (in_features, out_features)} of the layers to adapt;
        ValueError where none will do. `default` must then fit any layer.
    """

    metavar: str
    help: str
    default: int
    small: int | None = None
    minimum: int = 1
    maximum: int | None = None
    fit: Callable[[Mapping[str, tuple[int, int]]], int] | None = None
    default_help: str | None = None


class FileForm(NamedTuple):
    """One of the forms in which an adapter can be saved.

    key: its name in the command's report.
    label, file: how the command's table calls the adapter in this form, and its file.
    fields: what the configuration's fields have to be for it.
    help: what it is and what it serves, after "VeRA's".
    """

    key: str = "full"
    label: str = "complete"
    file: str = "full file"
    fields: Mapping[str, Any] = {}
    help: str = ""

    @property
    def folder(self) -> str:
        """The command's folder for it."""
        return "adapter" if self.key == "full" else f"adapter-{self.key.replace('_', '-')}"


@dataclass(frozen=True)
class Method:
    """An adapter method; its configuration's class holds it as `method`.

    title: its name for the reader.
    parts: name -> part; together they are everything that the method trains. No other method's part has the name.
    options: field of the configuration -> option.
    forms: how the command saves an adapter; the first one, "full", is how it is trained.
    lora_r: rank of the LoRA adapter whose size the command compares; None for the method's own.
    smaller: what makes the full file smaller, as a sentence without its full stop.
    """

    title: str
    parts: Mapping[str, Part]
    options: Mapping[str, Option] = field(default_factory=dict)
    forms: tuple[FileForm, ...] = (FileForm(),)
    lora_r: int | None = None
    smaller: str = ""

    @property
    def rates(self) -> dict[str, Part]:
        """The parts, by the names that their learning rates have as arguments and options."""
        return {f"{name}_lr": part for name, part in self.parts.items()}

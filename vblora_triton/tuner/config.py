"""The configuration that every adapter method shares, and how a configuration becomes `adapter_config.json`.

Standard library alone, here and in hub.py, so that reading a configuration costs no import of torch.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from vblora_triton.hub import CONFIG_NAME, AdapterFileError, local_folder
from vblora_triton.tuner.fields import check_bool, check_choice, check_layers, name_list, name_set
from vblora_triton.tuner.method import Method
from vblora_triton.tuner.seen import SeenAsPefts, loaded_peft, tell

# Whether a configuration is being read, and not chosen by somebody to whom advice would be of use.
_READING: ContextVar[bool] = ContextVar("_READING", default=False)

_Config = TypeVar("_Config", bound="PeftConfig")


# The version of PEFT whose files these are, in the place of one that is installed.
PEFT_VERSION = "0.21.2"


class PeftWarning(UserWarning):
    """Something that PEFT's users may want to hear of or to silence; of its name there."""


class MissingTypeError(AdapterFileError, TypeError):
    """A JSON object that says nothing of a method (TypeError to PEFT's users, AdapterFileError to ours, so both)."""


class PeftType(str, Enum):
    """The adapter methods, under the names that adapter_config.json uses; here those that PEFT has too.

    `PeftType(name)` takes the name of any method that is registered; see methods.py.
    """

    VBLORA = "VBLORA"
    VERA = "VERA"

    @classmethod
    def _missing_(cls, value: object) -> PeftType | None:
        if not isinstance(value, str) or value not in PeftConfig.known:
            return None
        member = str.__new__(cls, value)
        member._name_ = member._value_ = value
        return member


class TaskType(str, Enum):
    """What the adapted model is for; chooses the task class of `get_peft_model`."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the place of `path` when the block ends well.

    An exception, a full disk or a killed process leaves the old file as it was. The new one has its permissions.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_permissions(path))
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _permissions(path: Path) -> int:
    """Return the permissions of a file, or where there is none those that a plain open() would give."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


@dataclass
class PeftConfig(SeenAsPefts):
    """What every adapter's configuration holds.

    Args:
        task_type: a `TaskType`, its name, or None.
        peft_type: the method; a subclass sets it.
        auto_mapping: {"base_model_class", "parent_library"} of the base model, where there is no task type.
        peft_version: the version of PEFT that wrote the file, or that would write the same; carried, not interpreted.
        base_model_name_or_path: where the base model came from; filled in by `get_peft_model`.
        revision: the revision of the base model.
        inference_mode: the adapter is frozen when it is put on a model.
    Raises:
        ValueError, TypeError: a field that cannot be; the message names it.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    peft_name: ClassVar[str] = "PeftConfig"

    # Fields that say how the adapter's file is to be read; those of the file count, also where an adapter is refilled.
    file_fields: ClassVar[tuple[str, ...]] = ()
    # Those of them that say where values come from; an adapter that is refilled takes them over with the values.
    origin_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that say what the values of an adapter mean: it is refilled only from a file that agrees.
    fixed_fields: ClassVar[tuple[str, ...]] = ()
    # Fields that PEFT's class does not have; None is not written, so that PEFT reads the file without a warning.
    own_fields: ClassVar[tuple[str, ...]] = ()

    # A method's name in files, and what it says of itself.
    type_name: ClassVar[str | None] = None
    method: ClassVar[Method]
    # The configuration's class of each method that is registered, by its name in files; see methods.py.
    known: ClassVar[dict[str, type[PeftConfig]]] = {}

    def __post_init__(self) -> None:
        peft = loaded_peft()
        if peft is not None:
            tell(peft)
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION if peft is None else peft.config.PeftConfigMixin._get_peft_version()
        if self.type_name is not None:
            if self.peft_type not in (None, self.type_name):
                raise ValueError(
                    f"`peft_type` is {self.peft_type!r}, but {type(self).__name__} is for "
                    f"{self.type_name!r}; leave it out."
                )
            self.peft_type = PeftType(self.type_name)
        if self.task_type is not None:
            tasks = tuple(task.value for task in TaskType)
            if self.task_type not in tasks:
                raise ValueError(
                    f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                    f"{', '.join(tasks)}. `task_type` is {self.task_type!r}; choose one of "
                    f"{', '.join(map(repr, tasks))}, or leave it out."
                )
            self.task_type = TaskType(self.task_type)
        self.check()
        if not _READING.get():
            self.advise()

    def check(self) -> None:
        """Check every field; called when the configuration is made, and again before it is put on a model."""
        check_bool("inference_mode", self.inference_mode)
        for name, kinds in (
            ("auto_mapping", Mapping),
            ("peft_version", str),
            ("base_model_name_or_path", (str, os.PathLike)),
            ("revision", str),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                wanted = "a dictionary" if kinds is Mapping else "a string"
                raise TypeError(f"`{name}` is {value!r} ({type(value).__name__}); give {wanted}, or None.")

    def advise(self) -> None:
        """Warn of fields that can be, but have a catch; called when somebody makes the configuration."""

    @property
    def is_prompt_learning(self) -> bool:
        """False: no method of this package learns prompts. transformers and trl ask."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False, likewise."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return every field as a dictionary (a copy)."""
        return asdict(self)

    def to_json(self, **replaced: Any) -> str:
        """Write the fields as the text of adapter_config.json: sorted, indent 2, sets as sorted lists.

        Args:
            replaced: fields to write otherwise than they are, for instance `inference_mode=True`.
        """
        values = {**self.to_dict(), **replaced}
        values = {key: value for key, value in values.items() if value is not None or key not in self.own_fields}
        plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in values.items()}
        return json.dumps(plain, indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, as the fields are, into a folder, which is made if need be; atomically.

        Args:
            save_directory: the folder.
            auto_mapping_dict: written as `auto_mapping`, when given.
        Raises:
            ValueError: `save_directory` is a file.
            TypeError: an unknown keyword.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(
                f"`save_pretrained` of a configuration does not know {sorted(kwargs)}; to upload an adapter, use "
                "push_to_hub() of its model."
            )
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"`save_directory` is {str(folder)!r}, which is a file; give a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        replaced = {} if auto_mapping is None else {"auto_mapping": auto_mapping}
        with replacing(folder / CONFIG_NAME) as temporary:
            temporary.write_text(self.to_json(**replaced), encoding="utf-8")

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Make the configuration that a dictionary describes; `peft_type` in it chooses the class.

        Unknown keys are dropped with a warning, because newer versions add fields.

        Raises:
            ValueError: an unknown or missing `peft_type`, one of another class, or a field out of range.
            TypeError: `values` is no mapping, or a field has a wrong type.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"`values` is of type {type(values).__name__}; give a mapping of field names to values.")
        name = values.get("peft_type", cls.type_name)
        name = name.value if isinstance(name, PeftType) else name
        config_class = PeftConfig.known.get(name) if isinstance(name, str) else None
        if config_class is None:
            raise ValueError(f"`peft_type` is {name!r}; supported: {', '.join(sorted(PeftConfig.known))}.")
        if not issubclass(config_class, cls):
            raise ValueError(
                f"`peft_type` is {name!r}, which {cls.__name__} cannot hold; use {config_class.__name__} or PeftConfig."
            )
        known = {field.name for field in fields(config_class)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {config_class.__name__}, these are ignored. "
                "The file may come from a newer version.",
                stacklevel=2,
            )
        token = _READING.set(True)
        try:
            return config_class(**{key: value for key, value in values.items() if key in known})
        finally:
            _READING.reset(token)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike) -> dict[str, Any]:
        """Read one adapter_config.json as a dictionary of its fields, which `from_dict` takes.

        Raises:
            AdapterFileError: the file cannot be read, or is no JSON object.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise AdapterFileError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise AdapterFileError(f"{path} holds a JSON {type(values).__name__}; an object with fields is needed.")
        if values.pop("runtime_config", None) is not None:
            warnings.warn(
                "The configuration file contains a `runtime_config` key. This is ignored. Runtime configurations are "
                "only valid at runtime.",
                stacklevel=2,
            )
        return values

    @classmethod
    def from_file(cls: type[_Config], path: str | os.PathLike) -> _Config:
        """Read the configuration in one adapter_config.json.

        Raises:
            AdapterFileError: the file cannot be read, or describes no valid configuration; one that does not say its
                method, `peft_type`, is also a TypeError.
        """
        values = cls.from_json_file(path)
        if values.get("peft_type") is None:
            raise MissingTypeError(
                f"{path}: The {cls.__name__} config that is trying to be loaded is missing required keys: "
                "{'peft_type'}. It may belong to something else."
            )
        try:
            return cls.from_dict(values)
        except (TypeError, ValueError) as error:
            raise AdapterFileError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls: type[_Config],
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        **options: Any,
    ) -> _Config:
        """Read the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path: a folder with adapter_config.json, or an id on the Hub.
            subfolder: a folder inside it.
            options: of a download: `revision`, `token`, `cache_dir`, ...; see `hub.local_folder`.
        Raises:
            AdapterFileError: there is no such file, or it is broken, or it cannot be downloaded.
            TypeError: an unknown option.
        """
        folder = local_folder(pretrained_model_name_or_path, (), subfolder, **options)
        if not (folder / CONFIG_NAME).is_file():
            raise AdapterFileError(
                f"Can't find '{CONFIG_NAME}' at '{folder}': there is no {CONFIG_NAME}. Give the folder of a saved "
                "adapter, or an id on the Hub such as 'someone/their-adapter'."
            )
        return cls.from_file(folder / CONFIG_NAME)


class TargetedConfig(PeftConfig):
    """A configuration with the fields of every method that adapts linear layers.

    A method's class declares these fields among its own, because their order is that of PEFT's positional arguments.

    Args:
        target_modules: a list of names (a module matches with its whole name or with the end of it after a dot), a
            regular expression for the whole name, "all-linear" (every linear layer but the output head), or None for
            the usual layers of a known architecture.
        exclude_modules: names or an expression, as above, to leave alone.
        fan_in_fan_out: the weight is stored (in, out), as in GPT-2's Conv1D. Each layer's type decides; the field is
            set to what was found.
        bias: "none", "all" (every bias of the model is trained) or the method's name and "_only" (those of the adapted
            layers). Trained biases stay in force when the adapter is disabled.
        modules_to_save: names of further modules, for instance a classification head, to train in full and save.
        layers_to_transform: a layer number, or several, to adapt; None for all.
        layers_pattern: name of the list that holds the numbered layers, such as "layers" or "h".

    The common fields (`task_type`, ...) are those of `PeftConfig`.
    """

    def check(self: Any) -> None:
        """Check these fields, and turn lists of names into sets."""
        super().check()
        check_bool("fan_in_fan_out", self.fan_in_fan_out)
        check_choice("bias", self.bias, ("none", "all", f"{str(self.type_name).lower()}_only"))
        for name, names in (
            ("target_modules", name_set),
            ("exclude_modules", name_set),
            ("modules_to_save", name_list),
        ):
            setattr(self, name, names(name, getattr(self, name)))
        check_layers(self.layers_to_transform, self.layers_pattern, self.target_modules)

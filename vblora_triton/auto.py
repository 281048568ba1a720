"""AutoPeftModel and its kin: the base model and the adapter in one call, both from what the adapter's files say."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from vblora_triton import hub, task_models
from vblora_triton.card import is_path
from vblora_triton.hub import AdapterFileError
from vblora_triton.peft_model import PeftModel
from vblora_triton.tuner.config import PeftConfig, TaskType

# What both from_pretrained() of a base model and the download of an adapter take.
_SHARED_OPTIONS = ("token", "cache_dir", "force_download", "local_files_only")
_ADAPTER_OPTIONS = ("autocast_adapter_dtype", "low_cpu_mem_usage", "subfolder")


class AutoPeftModel:
    """Loads an adapter together with its base model; not made, but used through `from_pretrained`.

    The base model's class is the one that the adapter's configuration names in `auto_mapping` or, with a task type,
    the Auto class of transformers for the task.
    """

    _auto_class: ClassVar[str | None] = None
    _peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is not made by calling it; use {name}.from_pretrained(folder_or_id).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that a saved adapter was made for, and put the adapter on it.

        Args:
            pretrained_model_name_or_path: the adapter: a folder, or an id on the Hub.
            adapter_name, is_trainable: see `PeftModel.from_pretrained`.
            config: use this configuration instead of the saved one.
            revision: of the adapter's repository. That of the base model is in the configuration.
            import_allowlist: libraries that the base model's class may come from; transformers by default.
            kwargs: `subfolder`, `autocast_adapter_dtype` and `low_cpu_mem_usage` are for the adapter; `token`,
                `cache_dir`, `force_download` and `local_files_only` for both; all else (dtype, device_map, ...) for the
                base model's from_pretrained. `trust_remote_code` holds for the adapter's tokenizer too, whose code is
                neither run nor asked about without it.
        Returns:
            The adapted model, of this class's task, or for AutoPeftModel of the adapter's.
        Raises:
            AdapterFileError: the adapter cannot be read, or does not say what its base model is.
            ValueError: its task is another one, or its base model's class comes from elsewhere.
        """
        own = {name: kwargs.pop(name) for name in _ADAPTER_OPTIONS if name in kwargs}
        shared = {name: kwargs[name] for name in _SHARED_OPTIONS if name in kwargs}
        given = config
        if config is None:
            config = PeftConfig.from_pretrained(
                pretrained_model_name_or_path, own.get("subfolder"), revision=revision, **shared
            )
        if cls is AutoPeftModel and config.task_type is not None:
            wanted = PeftModel.class_for(config)
            cls = next(kind for kind in AutoPeftModel.__subclasses__() if kind._peft_class is wanted)
        base_class = cls._base_class(config, import_allowlist)
        if not config.base_model_name_or_path:
            raise AdapterFileError(
                f"The configuration of {str(pretrained_model_name_or_path)!r} does not say where its base model is "
                "(`base_model_name_or_path` is not set); load that yourself and give it to PeftModel.from_pretrained()."
            )
        source = _base_source(config.base_model_name_or_path, pretrained_model_name_or_path, own.get("subfolder"))
        base = base_class.from_pretrained(source, revision=config.revision, **kwargs)
        trusted = bool(kwargs.get("trust_remote_code"))
        _fit_vocabulary(base, pretrained_model_name_or_path, trusted, shared | {"revision": revision})
        return cls._peft_class.from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            given,
            revision=revision,
            **own,
            **shared,
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, import_allowlist: list[str] | None) -> Any:
        if config.task_type is not None:
            wanted = PeftModel.class_for(config)
            if wanted is not cls._peft_class:
                raise ValueError(
                    f"The adapter's `task_type` is {TaskType(config.task_type).value!r}, for which {cls.__name__} is "
                    f"the wrong class; use Auto{wanted.__name__}."
                )
        if cls._auto_class is not None:
            return getattr(import_module("transformers"), cls._auto_class)
        mapping = config.auto_mapping or {}
        library, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not isinstance(library, str) or not isinstance(name, str):
            raise AdapterFileError(
                "The adapter's configuration names neither a task nor, in `auto_mapping`, a class for its base model; "
                "load that yourself and give it to PeftModel.from_pretrained(), or use the class for its task, such as "
                "AutoPeftModelForCausalLM."
            )
        # A file that anyone may have written must not choose what is imported.
        allowed = ["transformers"] if import_allowlist is None else import_allowlist
        if not any(library == root or library.startswith(f"{root}.") for root in allowed):
            raise ValueError(
                f"The adapter's `auto_mapping` wants {name!r} from {library!r}, which is not in `import_allowlist` "
                f"({', '.join(allowed)}); if you trust it, give import_allowlist=[{library!r}]."
            )
        found = getattr(import_module(library), name, None)
        if not hasattr(found, "from_pretrained"):
            raise AdapterFileError(
                f"The adapter's `auto_mapping` names {name!r} of {library!r}, which is no model class."
            )
        return found


def _base_source(name: str, model_id: str | os.PathLike, subfolder: str | None) -> str:
    """Return where the base model is: a path such as ../base is meant from the adapter's own folder, if it is there.

    Raises:
        AdapterFileError: the name is a path, and nothing is there.
    """
    folder = Path(model_id, subfolder or "")
    beside = folder / name
    if name.startswith(("./", "../")) and beside.is_dir():
        return str(beside)
    if is_path(name) and not Path(name).expanduser().is_dir():
        raise AdapterFileError(
            f"The base model of {str(folder)!r} is not where its {hub.CONFIG_NAME} says (`base_model_name_or_path` is "
            f"{name!r}); move it back there, write its new place into that file, or load it yourself and call "
            f"PeftModel.from_pretrained(base_model, {str(folder)!r})."
        )
    return name


def _fit_vocabulary(base: Any, model_id: str | os.PathLike, trusted: bool, download: dict[str, Any]) -> None:
    """Widen the embedding to a tokenizer that was saved with the adapter, if that one knows more tokens."""
    if not hasattr(base, "get_input_embeddings") or not hub.has_tokenizer(model_id, **download):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=trusted, **download)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads an adapter for `task_type="CAUSAL_LM"` together with its base model."""

    _auto_class = "AutoModelForCausalLM"
    _peft_class = task_models.PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an adapter for `task_type="SEQ_2_SEQ_LM"` together with its base model."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _peft_class = task_models.PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads an adapter for `task_type="SEQ_CLS"` together with its base model."""

    _auto_class = "AutoModelForSequenceClassification"
    _peft_class = task_models.PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads an adapter for `task_type="TOKEN_CLS"` together with its base model."""

    _auto_class = "AutoModelForTokenClassification"
    _peft_class = task_models.PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads an adapter for `task_type="QUESTION_ANS"` together with its base model."""

    _auto_class = "AutoModelForQuestionAnswering"
    _peft_class = task_models.PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads an adapter for `task_type="FEATURE_EXTRACTION"` together with its base model."""

    _auto_class = "AutoModel"
    _peft_class = task_models.PeftModelForFeatureExtraction

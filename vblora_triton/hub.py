"""Adapters on the Hugging Face Hub: found, downloaded and uploaded through huggingface_hub's own functions.

huggingface_hub is imported where it is called: reading a configuration from a folder must not wait for it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIG_NAME = "adapter_config.json"
TOKENIZER_NAME = "tokenizer_config.json"

# What a caller may say about a download, and hf_hub_download takes under the same names.
DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only", "repo_type", "endpoint")

# What callers of PEFT say of where an adapter goes. It follows its layers: each part is put where the weight of its
# layer is or, where accelerate keeps that on the CPU or on disk between calls, where accelerate computes.
PLACEMENT = (
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
    *("ephemeral_gpu_offload", "use_safetensors"),
)


class AdapterFileError(ValueError):
    """A file of an adapter cannot be used; the message names the file and everything found wrong with it."""


def local_folder(
    model_id: str | os.PathLike, files: tuple[str, ...], subfolder: str | None = None, **options: Any
) -> Path:
    """Return the folder of a saved adapter, after downloading it if `model_id` is an id on the Hub.

    Args:
        model_id: a folder, which wins if there is one; or an id such as "someone/their-adapter".
        files: alternatives, of which the first that exists on the Hub is downloaded beside adapter_config.json; none
            to download that one alone.
        subfolder: a folder inside it.
        options: of `DOWNLOAD_OPTIONS`; they play no part where `model_id` is a folder.
    Returns:
        A folder. Of a local one, it is not checked that the files are there.
    Raises:
        AdapterFileError: neither a folder nor something that can be downloaded.
        TypeError: an unknown option.
    """
    unknown = sorted(set(options) - set(DOWNLOAD_OPTIONS))
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` is not an option of a download or of this call; a download takes "
            f"{', '.join(DOWNLOAD_OPTIONS)}."
        )
    folder = Path(model_id, subfolder or "")
    if not _on_hub(model_id):
        return folder
    config = _download(str(model_id), CONFIG_NAME, subfolder, options)
    if config is None:
        raise AdapterFileError(f"There is no {CONFIG_NAME} in {folder} on the Hub; give the id of a saved adapter.")
    # The same commit, should someone push one in between; it is the name of the folder in the cache.
    _, snapshots, rest = config.as_posix().partition("/snapshots/")
    same = {"revision": rest.partition("/")[0]} if snapshots else {}
    for name in files:
        if _download(str(model_id), name, subfolder, options | same) is not None:
            break
    return config.parent


def download_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a download, after a look at those that say where the adapter goes."""
    if options.get("offload_dir") is not None and options.get("offload_folder") is not None:
        raise ValueError("Cannot use `offload_folder` when `offload_dir` is specified.")
    return {name: value for name, value in options.items() if name not in PLACEMENT}


def has_tokenizer(model_id: str | os.PathLike, **options: Any) -> bool:
    """Say whether a tokenizer was saved with an adapter; of one on the Hub that cannot be asked, it is not known to."""
    if not _on_hub(model_id):
        return Path(model_id, TOKENIZER_NAME).is_file()
    try:
        return _download(str(model_id), TOKENIZER_NAME, None, options) is not None
    except AdapterFileError:
        return False


def _on_hub(model_id: str | os.PathLike) -> bool:
    """Say whether to ask the Hub: nothing of that name is here, and it has the form of an id."""
    if Path(model_id).exists():
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(str(model_id))
    except HFValidationError:
        return False
    return True


def _download(model_id: str, name: str, subfolder: str | None, options: dict[str, Any]) -> Path | None:
    """Download one file; None where the repository has none of that name."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(model_id, name, subfolder=subfolder or None, **options))
    except LocalEntryNotFoundError as error:
        # Not in the cache, and the Hub was not asked or not reached: the file may well exist.
        if options.get("local_files_only") and name != CONFIG_NAME:
            return None
        raise _failed(model_id, name, error) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # whatever the network raises
        raise _failed(model_id, name, error) from error


def _failed(model_id: str, name: str, error: Exception) -> AdapterFileError:
    reason = str(error).strip().partition("\n")[0]
    return AdapterFileError(
        f"`model_id` is {model_id!r}, which is no folder here, and {name} of that name on the Hub cannot be "
        f"downloaded: {type(error).__name__}: {reason}"
    )


def push(
    save: Callable[[Path], None],
    repo_id: str,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Upload what `save` writes into a folder to a repository on the Hub, which is made if need be.

    Args:
        save: called with an empty folder.
        repo_id: such as "someone/their-adapter".
        private: make a new repository private; None for the account's default.
        token, revision, create_pr, commit_message: see huggingface_hub.upload_folder.
    Returns:
        huggingface_hub's CommitInfo.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        return huggingface_hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )

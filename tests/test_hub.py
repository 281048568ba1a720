"""Adapters on the Hub: which files are asked for, how, and what is said where they are not there. All offline."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from tests.models import assert_unchanged, enlarge, outputs, snapshot, tiny_llama
from vblora_triton import AdapterFileError, AutoPeftModelForCausalLM, PeftConfig, PeftModel, VBLoRAConfig
from vblora_triton import get_peft_model as adapt

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "target_modules": ["q_proj"]}
SAFE, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


def saved(folder, safe: bool = True) -> PeftModel:
    model = enlarge(adapt(tiny_llama(), VBLoRAConfig(**FIELDS, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(folder, safe_serialization=safe)
    return model


class Hub:
    """Stands in for hf_hub_download: keeps the calls, and copies from one folder into a cache laid out as the real."""

    def __init__(self, remote: Path, cache: Path):
        self.remote, self.cache, self.calls = remote, cache, []

    def __call__(self, repo_id, filename, *, subfolder=None, **options):
        self.calls.append((filename, subfolder, options))
        if repo_id != "someone/adapter":
            raise OfflineModeIsEnabled(f"cannot reach the Hub for {repo_id}")
        source = self.remote / (subfolder or "") / filename
        if not source.is_file():
            raise EntryNotFoundError(f"404: {source}")
        target = self.cache / "models--someone--adapter" / "snapshots" / COMMIT / (subfolder or "") / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    stand_in = Hub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("subfolder", [None, "deep/er"])
def test_an_adapter_comes_from_the_hub_with_the_options_given(safe, subfolder, hub):
    model = saved(hub.remote / (subfolder or ""), safe)
    options = {"revision": "v2", "token": "secret", "cache_dir": "there", "force_download": True}
    again = PeftModel.from_pretrained(tiny_llama(), "someone/adapter", subfolder=subfolder, **options)
    assert torch.equal(outputs(again), outputs(model))
    same_commit = options | {"revision": COMMIT}
    weights = [(SAFE, subfolder, same_commit)] + ([] if safe else [(BIN, subfolder, same_commit)])
    assert hub.calls == [(CONFIG, subfolder, options), *weights]


def test_an_adapter_from_the_hub_is_added_and_refilled(hub):
    model = saved(hub.remote)
    other = enlarge(adapt(tiny_llama(), VBLoRAConfig(**FIELDS)), seed=4).eval()
    other.load_adapter("someone/adapter", "more", revision="v2")
    other.set_adapter("more")
    assert torch.equal(outputs(other), outputs(model))
    other.load_adapter("someone/adapter", "default")
    other.set_adapter("default")
    assert torch.equal(outputs(other), outputs(model))


def test_a_config_alone_asks_for_no_weights(hub):
    model = saved(hub.remote)
    assert PeftConfig.from_pretrained("someone/adapter", token="t").r == model.active_peft_config.r
    assert hub.calls == [(CONFIG, None, {"token": "t"})]


def test_a_folder_wins_over_an_id_and_is_never_asked_for(hub, tmp_path):
    model = saved(tmp_path / "someone" / "adapter")
    again = PeftModel.from_pretrained(tiny_llama(), "someone/adapter", revision="v2")
    assert torch.equal(outputs(again), outputs(model))
    assert not hub.calls


@pytest.mark.parametrize(
    ("model_id", "without", "words"),
    [
        ("someone/adapter", CONFIG, [CONFIG, "someone/adapter", "on the Hub"]),
        ("someone/adapter", SAFE, [SAFE, BIN]),
        ("someone/else", None, ["someone/else", "no folder", "cannot reach the Hub"]),
        ("not/an/id", None, ["not/an/id", CONFIG]),
    ],
)
def test_what_is_not_there_is_named_and_the_model_kept(model_id, without, words, hub):
    saved(hub.remote)
    if without:
        (hub.remote / without).unlink()
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(AdapterFileError) as caught:
        PeftModel.from_pretrained(model, model_id)
    assert all(word in str(caught.value) for word in words)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: PeftModel.from_pretrained(tiny_llama(), "someone/adapter", no_such_option=1),
        lambda model: model.load_adapter("someone/adapter", "more", no_such_option=1),
        lambda model: PeftConfig.from_pretrained("someone/adapter", no_such_option=1),
    ],
)
def test_an_unknown_option_is_refused_by_name_before_anything_is_asked(call, hub):
    model = saved(hub.remote)
    with pytest.raises(TypeError, match="no_such_option"):
        call(model)
    assert not hub.calls


def real_cache(folder: Path, remote: Path) -> None:
    """Lay a folder's files out as huggingface_hub's cache keeps them."""
    own = folder / "models--someone--adapter"
    shutil.copytree(remote, own / "snapshots" / COMMIT)
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text(COMMIT)


def test_the_cache_of_huggingface_hub_serves_without_the_hub(tmp_path):
    model = saved(tmp_path / "remote", safe=False)
    real_cache(tmp_path / "cache", tmp_path / "remote")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    again = PeftModel.from_pretrained(tiny_llama(), "someone/adapter", **options)
    assert torch.equal(outputs(again), outputs(model))
    with pytest.raises(AdapterFileError, match="someone/other"):
        PeftModel.from_pretrained(tiny_llama(), "someone/other", **options)


def test_weights_that_cannot_be_fetched_now_are_not_said_to_be_missing(hub, monkeypatch):
    saved(hub.remote)

    def unreachable(repo_id, filename, **options):
        if filename == CONFIG:
            return hub(repo_id, filename, **options)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(AdapterFileError, match="no connection"):
        PeftModel.from_pretrained(tiny_llama(), "someone/adapter")


def test_the_base_model_and_the_adapter_come_in_one_call(hub, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = saved(hub.remote)
    model.active_peft_config.base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(hub.remote)
    again = AutoPeftModelForCausalLM.from_pretrained("someone/adapter", revision="v2", token="secret")
    assert torch.equal(outputs(again), outputs(model))
    assert {options["token"] for _, _, options in hub.calls} == {"secret"}
    assert {options["revision"] for _, _, options in hub.calls} == {"v2", COMMIT}


def test_pushing_uploads_what_saving_writes(tmp_path, monkeypatch):
    model, calls = saved(tmp_path / "saved"), {}

    class Made:
        repo_id = "me/adapter"

    def create_repo(repo_id, **options):
        calls["create"] = (repo_id, options)
        return Made

    def upload_folder(*, folder_path, **options):
        calls["upload"] = options
        calls["files"] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return "the commit"

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert model.push_to_hub("adapter", commit_message="first", private=True, token="secret") == "the commit"
    assert calls["create"] == ("adapter", {"private": True, "token": "secret", "exist_ok": True})
    assert calls["upload"] == {
        "repo_id": "me/adapter",
        "commit_message": "first",
        "token": "secret",
        "revision": None,
        "create_pr": False,
    }
    assert calls["files"] == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}

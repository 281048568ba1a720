"""The output folder: all of a run's results appear in it, or none, and what else is in it stays."""

import sys
from pathlib import Path

import pytest

from tests.finetune.case import ADAPTER, REPORT_KEYS, TINY, comparable, everything_in, finetune, save_model, save_texts
from vblora_triton.finetune import InputError
from vblora_triton.finetune import output as outputs


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"))


def test_earlier_results_are_replaced_and_other_files_kept(model_dir, texts, tmp_path):
    common = ["--output", tmp_path, "--model", model_dir, "--data", *texts, *TINY, *ADAPTER]
    (tmp_path / "notes").write_text("mine")
    for name in ("adapter", "adapter-topk", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
    (tmp_path / "report.json").write_text("stale")
    assert finetune(*common) == 0
    assert (tmp_path / "notes").read_text() == "mine"
    assert not list(tmp_path.rglob("stale"))
    assert {path.name for path in tmp_path.iterdir()} - {"loss.png"} == {
        "notes",
        "adapter",
        "adapter-topk",
        "report.json",
    }
    assert set(comparable(tmp_path)[0]) == REPORT_KEYS - {"seconds"}


@pytest.mark.parametrize("installed", [True, False], ids=["with", "without"])
def test_plot_is_written_where_matplotlib_is_installed(model_dir, texts, tmp_path, monkeypatch, installed):
    if installed:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    # Of an earlier run: what this run does not write must not stay beside its report.
    for name in ("loss.png", "report.json"):
        (tmp_path / name).write_text("stale")
    assert finetune("--output", tmp_path, "--model", model_dir, "--data", *texts, *TINY, *ADAPTER, "--steps", "1") == 0
    assert (tmp_path / "loss.png").exists() == installed
    assert not installed or (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("failing", range(4))
def test_results_are_put_back_when_moving_them_fails_half_way(tmp_path, monkeypatch, failing):
    for name in ("adapter", "report.json"):
        (tmp_path / name).write_text("old")
    before = everything_in(tmp_path)
    rename, calls = Path.rename, []

    def failing_rename(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing_rename)

    def write():
        with outputs.all_or_nothing(tmp_path) as folder:
            for name in ("adapter", "report.json"):
                (folder / name).write_text("new")

    with pytest.raises(InputError, match="No space left"):
        write()
    assert everything_in(tmp_path) == before

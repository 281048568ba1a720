"""The output folder: all of a run's results appear in it, or none, and what else is in it stays."""

import itertools
import signal
import sys
from pathlib import Path

import pytest

from tests.finetune.case import ADAPTER, REPORT_KEYS, TINY, comparable, everything_in, finetune, save_model, save_texts
from vblora_triton.finetune import InputError
from vblora_triton.finetune import output as outputs


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise KeyboardInterrupt, also in a process that was started to ignore it, as in the background."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


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


def write_new(folder) -> None:
    """What a run writes, over the results of an earlier one."""
    with outputs.all_or_nothing(folder) as new:
        for name in ("adapter", "report.json"):
            (new / name).write_text("new")


def with_old_results(folder) -> dict:
    for name in ("adapter", "adapter-topk", "report.json"):
        (folder / name).write_text("old")
    return everything_in(folder)


@pytest.mark.parametrize("failing", range(5))
def test_results_are_put_back_when_moving_them_fails_half_way(tmp_path, monkeypatch, failing):
    before = with_old_results(tmp_path)
    rename, calls = Path.rename, []

    def failing_rename(source, target):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(InputError, match="No space left"):
        write_new(tmp_path)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("failing", range(5))
def test_results_are_put_back_when_a_move_is_interrupted(tmp_path, monkeypatch, failing, done):
    before = with_old_results(tmp_path)
    rename, calls = Path.rename, []

    def interrupted_rename(source, target):
        calls.append(source)
        if len(calls) != failing + 1:
            return rename(source, target)
        if done:
            rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted_rename)
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path)
    assert everything_in(tmp_path) == before


def test_former_results_are_kept_somewhere_when_they_cannot_be_put_back(tmp_path, monkeypatch):
    before = with_old_results(tmp_path)
    rename, calls = Path.rename, []

    def breaking_rename(source, target):
        calls.append(source)
        if len(calls) >= 3:
            raise OSError(5, "Input/output error")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", breaking_rename)
    with pytest.raises(InputError, match="Input/output error"):
        write_new(tmp_path)
    assert len(before) == len([path for path in tmp_path.rglob("*") if path.is_file() and path.read_text() == "old"])


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("first", range(5))
def test_ctrl_c_at_every_move_leaves_the_new_results(tmp_path, monkeypatch, first):
    with_old_results(tmp_path)
    rename, calls = Path.rename, []

    def rename_and_signal(source, target):
        rename(source, target)
        calls.append(source)
        if len(calls) > first:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Path, "rename", rename_and_signal)
    with pytest.raises(KeyboardInterrupt):
        write_new(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"adapter": "new", "report.json": "new"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_any_line_leaves_all_old_results_or_all_new_ones(tmp_path):
    """A signal of the system's own at each line that runs between the last write and the end."""

    def interrupt_at(number):
        lines = itertools.count()

        def trace(frame, event, argument):
            if frame.f_code.co_filename != outputs.__file__:
                return None
            if event == "line" and next(lines) == number:
                signal.raise_signal(signal.SIGINT)
            return trace

        return trace

    ends = set()
    for number in range(1000):
        folder = tmp_path / str(number)
        folder.mkdir()
        old, stamp = with_old_results(folder), outputs.stamp(folder)
        interrupted = False
        try:
            with outputs.all_or_nothing(folder) as new:
                for name in ("adapter", "report.json"):
                    (new / name).write_text("new")
                sys.settrace(interrupt_at(number))
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        found = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        replaced = outputs.stamp(folder) != stamp
        assert found == ({"adapter": "new", "report.json": "new"} if replaced else dict.fromkeys(found, "old"))
        assert replaced or len(found) == len(old)
        ends.add(replaced)
        if not interrupted:
            break
    assert 20 < number < 999
    assert ends == {False, True}


@pytest.mark.parametrize(("written", "words"), [(False, "nothing was written"), (True, "had been written")])
def test_an_interrupted_command_says_whether_there_are_results(written, words, tmp_path, monkeypatch, capsys):
    with_old_results(tmp_path)

    def interrupted_run(options):
        if written:
            write_new(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr("vblora_triton.finetune.finetune", interrupted_run)
    assert finetune("--output", tmp_path) == 130
    assert words in capsys.readouterr().err


def test_results_that_were_private_stay_private(tmp_path):
    def write(new):
        (new / "adapter").mkdir()
        for name in ("adapter/weights", "report.json"):
            (new / name).write_text("new")

    with outputs.all_or_nothing(tmp_path) as new:
        write(new)
    (tmp_path / "adapter").chmod(0o700)
    (tmp_path / "report.json").chmod(0o600)
    with outputs.all_or_nothing(tmp_path) as new:
        write(new)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("adapter", "report.json")]
    assert modes == [0o700, 0o600]

"""Saving over an adapter: whenever the process ends, and whoever reads meanwhile, there is the old or the new one."""

import hashlib
import os
import shutil
import stat
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model

SAFE, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
NAMES = (SAFE, BIN, CONFIG)
# What Python tells before it touches the disk; whatever writes bytes has opened its file before.
TOUCHES = {f"os.{name}" for name in ("rename", "remove", "link", "symlink", "mkdir", "rmdir", "chmod")} | {"open"}

BANK = {"num_vectors": 8, "vector_length": 16, "topk": 2}
OLD = {"make": VBLoRAConfig, "r": 2, "target_modules": ["a"], **BANK}
CHANGES = {
    "weights": {},
    "r": {"r": 3},
    "h": {"num_vectors": 12},
    "k": {"topk": 3},
    "targets": {"target_modules": ["a", "b"]},
    "form": {"save_only_topk_weights": True},
    "bin": {"safe": False},
    "bin and r": {"safe": False, "r": 3},
    "method": {"make": VeraConfig, **dict.fromkeys(BANK)},
}


class KilledError(BaseException):
    """Stands for the end of the process: from here on nothing touches the disk."""


class Watch:
    """Calls `act` before everything that Python does to files, while it is on."""

    def __init__(self) -> None:
        self.act = None
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.act is not None and event in TOUCHES:
            self.act(event, arguments)

    @contextmanager
    def on(self, act):
        self.act = act
        try:
            yield
        finally:
            self.act = None


@pytest.fixture(scope="module")
def watch():
    # Python takes no audit hook off again.
    return Watch()


def base() -> nn.Module:
    torch.manual_seed(0)
    return Base()


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.b(self.a(x))


def adapter(seed, make, safe=True, **fields):
    """What saves an adapter of these fields, with values of its own."""
    config = make(**{name: value for name, value in fields.items() if value is not None})
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lambda folder: model.save_pretrained(folder, safe_serialization=safe)


def ours(folder):
    return computed(PeftModel, folder)


def peft(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return computed(pytest.importorskip("peft").PeftModel, folder)


def computed(kind, folder) -> torch.Tensor:
    with torch.no_grad():
        x = torch.linspace(-1, 1, 64).reshape(2, 32)
        return kind.from_pretrained(base(), str(folder)).eval()(x)


def contents(folder: Path) -> str:
    """What a reader finds in a folder: the configuration, and the first of the weights that is there."""
    there = [name for name in NAMES if (folder / name).exists()]
    return repr([(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in (there[0], there[-1])])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(pytest.param({}, change, id=name) for name, change in CHANGES.items()),
        *(pytest.param(CHANGES[name], {}, id=f"{name}, back") for name in ("targets", "form", "bin", "bin and r")),
    ],
)
def test_a_save_that_is_killed_anywhere_leaves_the_old_adapter_or_the_new_one(before, after, watch, tmp_path):
    first, second = adapter(1, **OLD | before), adapter(2, **OLD | after)
    start, done = tmp_path / "start", tmp_path / "done"
    first(start)
    first(done)
    second(done)
    states = {contents(start): start, contents(done): done}
    whole = {read: [read(start), read(done)] for read in (ours, peft)}
    assert not any(torch.allclose(*both) for both in whole.values())

    for n in range(1000):
        folder, left = tmp_path / "killed", n

        def die(*_):
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError

        shutil.copytree(start, folder)
        try:
            with watch.on(die):
                second(folder)
        except KilledError:
            pass
        else:
            break
        # Many moments leave the same behind.
        if contents(folder) not in states:
            states[contents(folder)] = folder
            for read, expected in whole.items():
                found = read(folder)
                assert any(torch.equal(found, one) for one in expected), (n, read)
        # The next save, of either, is as good as any, and clears up.
        for save, at in ((second, done), (first, start)) if n % 16 == 8 else ():
            save(folder)
            assert contents(folder) == contents(at)
            assert sorted(os.listdir(folder)) == sorted(os.listdir(at))
            assert not any(path.is_symlink() for path in folder.iterdir())
        shutil.rmtree(folder)
    assert n > 20


@pytest.mark.parametrize("change", [CHANGES["r"], CHANGES["bin"]], ids=["r", "bin"])
def test_a_save_that_fails_anywhere_puts_everything_back_or_through(change, watch, tmp_path):
    first, second = adapter(1, **OLD), adapter(2, **OLD | change)
    first(tmp_path / "start")
    second(tmp_path / "done")
    allowed = {contents(tmp_path / name) for name in ("start", "done")}
    for n in range(1000):
        folder, left = tmp_path / "failed", n

        def fail(*_):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError("disk full")

        shutil.copytree(tmp_path / "start", folder)
        with watch.on(fail), suppress(OSError):
            second(folder)
        finished = left >= 0
        assert contents(folder) in allowed
        shutil.rmtree(folder)
        if finished:
            break
    assert n > 20


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_reader_gets_one_whole_adapter_while_another_is_saved(change, watch, tmp_path):
    saves = [adapter(1, **OLD), adapter(2, **OLD | change)]
    whole = []
    for save in saves:
        save(tmp_path)
        whole.append(ours(tmp_path))
    # Between any two things that the reader does: the other adapter, complete.
    for n in range(100):
        saves[0](tmp_path)
        count = n

        def save_between(event, arguments):
            nonlocal count
            if str(arguments[0]).startswith(str(tmp_path)):
                count -= 1
                if count == -1:
                    watch.act = None
                    saves[1](tmp_path)

        with watch.on(save_between):
            found = ours(tmp_path)
        assert any(torch.equal(found, one) for one in whole), n
        if count >= 0:
            break
    assert n > 1


def test_what_killed_saves_left_behind_is_cleared_away(tmp_path):
    for name in (f".{SAFE}.abcd1234.tmp", f".{CONFIG}.abcd1234.tmp"):
        (tmp_path / name).write_text("{")
    (tmp_path / ".adapter.xyz.tmp" / "new").mkdir(parents=True)
    (tmp_path / ".mine.tmp").write_text("not an adapter's")
    adapter(1, **OLD)(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.tmp", "README.md", CONFIG, SAFE]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are those of POSIX")
@pytest.mark.parametrize("change", [{}, {"r": 3}, {"safe": False}], ids=["weights", "r", "bin"])
def test_files_keep_their_permissions_when_they_are_saved_over(change, tmp_path):
    adapter(1, **OLD)(tmp_path)
    new = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (SAFE, CONFIG)}
    umask = os.umask(0)
    os.umask(umask)
    assert new == {0o666 & ~umask}
    (tmp_path / SAFE).chmod(0o600)
    (tmp_path / CONFIG).chmod(0o640)
    adapter(2, **OLD | change)(tmp_path)
    weights = BIN if change == {"safe": False} else SAFE
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (weights, CONFIG)]
    assert modes == [0o600, 0o640]
    VBLoRAConfig().save_pretrained(tmp_path)
    assert stat.S_IMODE((tmp_path / CONFIG).stat().st_mode) == 0o640


def test_where_there_are_no_links_a_save_still_goes_through(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    adapter(1, **OLD)(tmp_path)
    adapter(2, **OLD | {"r": 3})(tmp_path)
    adapter(2, **OLD | {"r": 3})(tmp_path / "alone")
    assert contents(tmp_path) == contents(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, SAFE, "alone"]


def test_a_folder_without_a_configuration_is_refused_by_name(tmp_path):
    adapter(1, **OLD)(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match=CONFIG):
        ours(tmp_path)

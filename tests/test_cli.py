"""The command line: what it refuses is one line on stderr, exit code 2, and no file; its help."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, T5Config

from tests.finetune.case import ADAPTER, TINY, everything_in, finetune, save_model, save_texts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"))


def bad_cases():
    """id -> (arguments that come last and so win, a pattern that the one line on stderr must hold)"""
    return {
        "data-missing": (["--data", "nowhere.txt"], r"--data nowhere\.txt does not exist; give"),
        "data-folder": (["--data", "."], r"--data \. is a folder"),
        "data-empty": (["--data", "empty.txt"], r"--data empty\.txt is empty; give"),
        "data-blank": (["--data", "blank.txt"], r"--data blank\.txt is empty; give"),
        "data-not-utf8": (["--data", "latin.txt"], r"--data latin\.txt is not UTF-8 text \(byte 2\)"),
        "data-short": (["--data", "short.txt"], r"has 21 tokens, but --seq-len 16 needs at least 32.*at most 10"),
        "vector-length": (["--vector-length", "48"], r"`vector_length` is 48, but .*proj.*32 .*divide"),
        "topk": (["--topk", "25"], r"`topk` is 25, but .*24.* from 1 to 24"),
        "targets": (["--target-modules", "nonsense"], r"nonsense.*q_proj"),
        "targets-expression": (["--target-modules", "(q"], r"`target_modules` is '\(q'.*expression"),
        "output-in-a-file": (["--output", "short.txt/deep/out"], r"--output short\.txt/deep/out cannot be written"),
        "output-is-a-file": (["--output", "short.txt"], r"--output short\.txt cannot be written"),
        "output-taken": (["--output", "taken"], r"--output taken already holds adapter.*choose another"),
        "model-missing": (["--model", "./nowhere"], r"--model \./nowhere is not a directory; give"),
        "model-is-a-file": (["--model", "short.txt"], r"--model short\.txt is not a directory; give"),
        "model-id-unknown": (["--model", "nobody/nothing"], r"--model nobody/nothing cannot be loaded: .* Give"),
        "model-without-config": (["--model", "taken"], r"--model taken cannot be loaded: .*model_type.* Give"),
        "model-without-tokenizer": (["--model", "mute"], r"--model mute has no usable tokenizer.*Save its tokenizer"),
        "model-without-weights": (["--model", "hollow"], r"--model hollow cannot be loaded: .*model\.safetensors"),
        "model-of-another-kind": (["--model", "t5"], r"--model t5 is no causal language model"),
        "model-quantised": (["--model", "quantised"], r"--model quantised is quantised, .*; give the unquantised"),
        "tokenizer-too-large": (["--model", "narrow"], r"vocabulary of 100, but its tokenizer gives id \d+"),
        "seq-len-beyond-positions": (["--seq-len", "65"], r"--seq-len is 65, but .* only 64 positions"),
        "diverging": (["--vector-bank-lr", "1e30"], r"Training diverged: .* lower --vector-bank-lr"),
        "steps": (["--steps", "0"], r"argument --steps: '0' is not a whole number of at least 1"),
        "lr": (["--lr", "nan"], r"argument --lr: 'nan' is not a number above 0"),
        "seed": (["--seed", str(2**32)], r"argument --seed: .* from 0 to 4294967295"),
        "dtype": (["--dtype", "float8"], r"argument --dtype: invalid choice: 'float8'"),
        "backend": (["--backend", "cuda"], r"argument --backend: invalid choice: 'cuda'"),
        "method": (["--method", "lora"], r"argument --method: invalid choice: 'lora'"),
        "topk-with-vera": (["--method", "vera"], r"--num-vectors is an option of VB-LoRA, but --method is vera; leave"),
        "key-with-vblora": (
            ["--projection-prng-key", "1"],
            r"--projection-prng-key is an option of VeRA, but .* vblora",
        ),
        "rate-with-vblora": (["--lambda-lr", "1"], r"--lambda-lr is an option of VeRA, but .* give --method vera"),
        "key": (["--projection-prng-key", "-1"], r"argument --projection-prng-key: '-1' is not a whole number from 0"),
        "unknown-option": (["--rank", "4"], r"unrecognized arguments: --rank 4"),
    }


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "latin.txt").write_bytes(b"Gr\xf6\xdfe")
    (folder / "short.txt").write_text("twenty characters ok")
    (folder / "taken" / "adapter").mkdir(parents=True)
    save_model(folder / "mute", tokenizer=False)
    save_model(folder / "narrow", vocab_size=100)
    save_model(folder / "hollow")
    (folder / "hollow" / "model.safetensors").unlink()
    save_model(folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    T5Config(vocab_size=257, d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2).save_pretrained(folder / "t5")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder / "t5")
    return folder


def shell(*arguments, cwd, **settings):
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "vblora_triton", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **settings)


@pytest.mark.parametrize(("arguments", "message"), bad_cases().values(), ids=bad_cases().keys())
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    bad_input, model_dir, texts, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(bad_input)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = everything_in(bad_input)
    given = ["--model", model_dir, "--data", *texts, "--output", "new/out", *TINY, *ADAPTER]
    try:
        code = finetune(*given, *arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    # A bar on stderr belongs to a training that had started; the message is a line of its own.
    said = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    *bars, line = said
    assert all(bar.startswith("adapter: ") for bar in bars)
    assert not bars or "diverged" in message
    # The loss is lost for good: the remaining steps are not taken.
    assert not any(" 6/6 " in bar for bar in bars)
    assert line.startswith("vblora-triton")
    assert re.search(message, line)
    assert everything_in(bad_input) == before


def test_command_line_refuses_triton_without_a_gpu_in_one_line(tmp_path, model_dir, texts):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    given = ["--model", model_dir, "--data", *texts, "--output", "out", "--backend", "triton"]
    done = shell("finetune", *given, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"vblora-triton finetune: error: --backend 'triton' cannot run here: .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_failure_while_writing_leaves_the_earlier_results_as_they_were(tmp_path, model_dir, texts):
    given = ["--model", model_dir, "--data", *texts, "--output", "out", *TINY, *ADAPTER]
    (tmp_path / "out" / "adapter").mkdir(parents=True)
    (tmp_path / "out" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "out" / "report.json").write_text("{}")
    before = everything_in(tmp_path)
    # As if the disk were full after the first 8 KiB of a file.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    done = shell("finetune", *given, cwd=tmp_path, preexec_fn=limit)
    assert done.returncode == 2
    assert re.search(r"vblora-triton finetune: error: --output out cannot be written \(.*\n\Z", done.stderr)
    assert everything_in(tmp_path) == before


def test_help_names_every_option(tmp_path):
    done = shell("finetune", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    adapter = ["method", "r", "num-vectors", "vector-length", "topk", "projection-prng-key", "target-modules"]
    training = ["steps", "batch-size", "seq-len", "lr", "vector-bank-lr", "logits-lr", "lambda-lr", "seed"]
    for option in ["model", "data", "output", *adapter, *training, "backend", "dtype"]:
        assert re.search(rf"^  --{option} ", done.stdout, re.MULTILINE), option

"""The command line: what it refuses is one line on stderr, exit code 2, and no file; its help."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
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
        "rank-beyond-memory": (
            ["--r", str(10**9)],
            r"the adapter's [\d,]{15,} \(--r 1000000000, .* has [\d,]{10,} bytes of",
        ),
        "bank-beyond-memory": (
            ["--num-vectors", str(10**15)],
            r"the adapter's [\d,]{18,} .* bytes of memory; make them",
        ),
        "layers-broken": (["--model", "no-heads"], r"--model no-heads cannot be loaded: "),
        "size-broken": (["--model", "no-size"], r"--model no-size cannot be loaded: "),
        "config-no-json": (["--model", "no-json"], r"--model no-json cannot be loaded: "),
        "config-a-list": (["--model", "listed"], r"--model listed cannot be loaded: "),
        "pickle-broken": (["--model", "pickled"], r"--model pickled cannot be loaded: "),
        "pickle-of-another-thing": (["--model", "unpickled"], r"--model unpickled cannot be loaded: "),
        "tensors-broken": (["--model", "cut"], r"--model cut cannot be loaded: "),
        "tokenizer-broken": (["--model", "dumb"], r"--model dumb has no usable tokenizer: "),
        "json-lines": (["--data", "bad.jsonl"], r"--data bad\.jsonl, line 2: no JSON"),
        "json": (["--data", "range.json"], r"--data range\.json ends in \.json; give \.jsonl"),
        "chat-without-template": (["--data", "chat.jsonl"], r"tokenizer of .* has no chat template.*give `prompt`"),
        "eval-data-missing": (["--eval-data", "nowhere.txt"], r"--eval-data nowhere\.txt does not exist; give"),
        "eval-data-short": (["--eval-data", "empty.jsonl"], r"--eval-data empty\.jsonl is empty"),
        "nothing-to-resume": (["--resume"], r"--resume: there is no checkpoint in new/out/checkpoints; leave it out"),
        "reporter": (["--report-to", "nobody"], r"--report-to nobody is not known or not installed"),
        "options-missing": (["--config", "nowhere.yaml"], r"--config nowhere\.yaml cannot be read: FileNotFoundError"),
        "options-broken": (["--config", "broken.yaml"], r"--config broken\.yaml cannot be read: "),
        "options-no-mapping": (["--config", "short.txt"], r"--config short\.txt holds no mapping of options"),
        "options-nested": (["--config", "nested.json"], r"--config nested\.json: 'lr' is \{'a': 1\}; give a value"),
        "options-unknown": (["--config", "unknown.json"], r"unrecognized arguments: --rank=4"),
        "options-out-of-range": (
            ["--config", "range.json"],
            r"argument --steps: '0' is not a whole number of at least 1",
        ),
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
    # They come before those that the test gives, and are read all the same.
    contents = {
        "bad.jsonl": '{"text": "a"}\n{"text": ',
        "chat.jsonl": '{"messages": [{"role": "assistant", "content": "Hi"}]}\n',
        "empty.jsonl": "\n",
        "broken.yaml": "a: [b",
        "nested.json": '{"lr": {"a": 1}}',
        "unknown.json": '{"rank": 4}',
        "range.json": '{"steps": 0}',
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    broken_models(folder, model_dir)
    return folder


def broken_models(folder, model_dir):
    """Write models with files that are broken, each in a way of its own."""
    config = json.loads((model_dir / "config.json").read_text())
    configs = {
        "no-heads": json.dumps(config | {"num_attention_heads": 0}),
        "no-size": json.dumps(config | {"hidden_size": "large"}),
        "no-json": "{",
        "listed": "[]",
    }
    for name, content in configs.items():
        shutil.copytree(model_dir, folder / name)
        (folder / name / "config.json").write_text(content)
    weights = {
        "pickled": ("pytorch_model.bin", b"\x80\x04."),
        "unpickled": ("pytorch_model.bin", pickle.dumps({"a": print})),
        "cut": ("model.safetensors", (model_dir / "model.safetensors").read_bytes()[:1000]),
        "dumb": ("tokenizer.json", b"{}"),
    }
    for name, (file, content) in weights.items():
        shutil.copytree(model_dir, folder / name)
        if file.endswith(".bin"):
            (folder / name / "model.safetensors").unlink()
        (folder / name / file).write_bytes(content)


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
    # Others say something of themselves when they are imported, as torchao does.
    *_, line = lines = done.stderr.splitlines()
    assert re.fullmatch(r"vblora-triton finetune: error: --backend 'triton' cannot run here: .*", line)
    assert sum(line.startswith("vblora-triton") for line in lines) == 1
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


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_may_stand_in_a_file_and_the_command_lines_win(suffix, tmp_path, monkeypatch):
    values = {"output": "out", "steps": 7, "lr": 1e-3, "batch-size": 3, "target_modules": ["q_proj", "v_proj"]}
    values |= {"resume": True, "data": "one.txt", "seed": None}
    text = json.dumps(values) if suffix == "json" else yaml.safe_dump(values)
    (tmp_path / f"options.{suffix}").write_text(text)
    seen = []
    monkeypatch.setattr("vblora_triton.finetune.finetune", seen.append)
    assert finetune("--steps", "9", f"--config={tmp_path}/options.{suffix}") == 0
    (options,) = seen
    assert (options.output, options.steps, options.lr, options.batch_size) == ("out", 9, 1e-3, 3)
    assert (options.target_modules, options.data, options.resume) == (("q_proj", "v_proj"), ("one.txt",), True)
    assert options.seed == 0


def test_help_names_every_option(tmp_path):
    done = shell("finetune", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    adapter = ["method", "r", "num-vectors", "vector-length", "topk", "projection-prng-key", "target-modules"]
    training = ["steps", "batch-size", "seq-len", "lr", "vector-bank-lr", "logits-lr", "lambda-lr", "seed"]
    running = ["eval-data", "config", "checkpoint-every", "resume", "report-to"]
    for option in ["model", "data", "output", *adapter, *training, *running, "backend", "dtype"]:
        assert re.search(rf"^  --{option} ", done.stdout, re.MULTILINE), option


@pytest.mark.parametrize(("given", "found"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_do_not_spin_unless_somebody_says_so(given, found, tmp_path):
    # OpenMP reads it when torch is imported.
    code = """
import os, sys
from vblora_triton.cli import main
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit(0)
sys.meta_path.insert(0, Watch())
main(["finetune", "--model", "nowhere", "--output", sys.argv[1]])
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [found], result.stderr

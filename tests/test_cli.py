"""The command `vblora-triton finetune`: what it writes is recomputed from the files; what it refuses leaves none."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, T5Config

from vblora_triton import PeftModel
from vblora_triton.cli import main
from vblora_triton.finetune import InputError
from vblora_triton.finetune import output as outputs
from vblora_triton.finetune.data import Sequences, python_source, split

SEQ_LEN, R, H, B, K = 16, 2, 24, 16, 3
TINY = ["--steps", "6", "--batch-size", "4", "--seq-len", str(SEQ_LEN)]
ADAPTER = ["--r", str(R), "--num-vectors", str(H), "--vector-length", str(B), "--topk", str(K)]
RATES = ["--vector-bank-lr", "3e-2", "--logits-lr", "3e-1"]
MEASURED = {"loss_before", "loss_after", "trainable_parameters", "bytes", "max_abs_diff"}
REPORT_KEYS = {"method", "backend", "steps", "seconds", *MEASURED}


def save_model(folder: Path, *, vocab_size: int = 257, tokenizer: bool = True) -> Path:
    """Write a tiny Llama, with a tokenizer that gives UTF-8's bytes in an order of its own, and 256 for the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        byte_level = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
        byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("She sells sea shells. " * 40, encoding="utf-8")
    (folder / "two.txt").write_text("Größe zählt — nicht. " * 60, encoding="utf-8")
    return [str(folder / "one.txt"), str(folder / "two.txt")]


@pytest.fixture(scope="module")
def run(model_dir, texts, tmp_path_factory):
    """One whole run on a model of one's own: its output folder and its report."""
    output = tmp_path_factory.mktemp("run") / "deep" / "output"
    arguments = ["--model", str(model_dir), "--data", *texts, "--output", str(output), *TINY, *ADAPTER, *RATES]
    assert main(["finetune", *arguments]) == 0
    return output, json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def held_out(model_dir, texts):
    """The last tenth of the sequences, from the tokenizer's own files."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokens = []
    for text in texts:
        tokens += [*tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"], tokenizer.eos_token_id]
    rows = [tokens[i : i + SEQ_LEN] for i in range(0, len(tokens) - SEQ_LEN + 1, SEQ_LEN)]
    return torch.tensor(rows[len(rows) - len(rows) // 10 :])


def loss_of(model, sequences):
    with torch.no_grad():
        logits = model.eval()(sequences).logits.double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), sequences[:, 1:].flatten()).item()


def base_of(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir)


def test_report_has_exactly_the_documented_keys(run):
    _, report = run
    assert set(report) == REPORT_KEYS
    assert set(report["bytes"]) == {"base", "full", "topk", "lora"}
    assert set(report["max_abs_diff"]) == {"reloaded_full", "reloaded_topk", "merged"}
    assert (report["method"], report["backend"], report["steps"]) == ("vblora", "reference", 6)
    assert report["seconds"] > 0


def test_output_holds_the_results_and_nothing_else(run):
    output, _ = run
    assert {path.name for path in output.iterdir()} - {"loss.png"} == {"adapter", "adapter-topk", "report.json"}


def test_loss_before_is_the_base_models(run, model_dir, held_out):
    assert run[1]["loss_before"] == pytest.approx(loss_of(base_of(model_dir), held_out), rel=1e-6)


def test_loss_after_is_that_of_the_saved_adapter_in_peft(run, model_dir, held_out):
    peft = pytest.importorskip("peft")
    output, report = run
    adapted = peft.PeftModel.from_pretrained(base_of(model_dir), output / "adapter")
    assert report["loss_after"] == pytest.approx(loss_of(adapted, held_out), rel=1e-5)
    assert report["loss_after"] < report["loss_before"] - 0.01


def test_topk_adapter_computes_in_peft_what_the_report_says(run, model_dir, held_out):
    peft = pytest.importorskip("peft")
    output, report = run
    adapted = peft.PeftModel.from_pretrained(base_of(model_dir), output / "adapter-topk")
    assert report["loss_after"] == pytest.approx(loss_of(adapted, held_out), rel=1e-5)


def test_nothing_is_lost_by_reloading_and_little_by_merging(run):
    differences = run[1]["max_abs_diff"]
    assert differences["reloaded_full"] == 0
    assert differences["reloaded_topk"] <= 1e-4
    assert 0 < differences["merged"] <= 1e-4


def test_sizes_are_those_of_the_files(run, model_dir):
    output, report = run
    assert report["bytes"]["base"] == (model_dir / "model.safetensors").stat().st_size
    for key, folder in (("full", "adapter"), ("topk", "adapter-topk")):
        assert report["bytes"][key] == (output / folder / "adapter_model.safetensors").stat().st_size


def test_lora_size_is_that_of_a_file_from_peft(run, model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=R, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base_of(model_dir), config).save_pretrained(tmp_path)
    assert run[1]["bytes"]["lora"] == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_trainable_parameters_are_those_in_the_full_file(run):
    output, report = run
    saved = load_file(output / "adapter" / "adapter_model.safetensors")
    assert report["trainable_parameters"] == sum(tensor.numel() for tensor in saved.values())
    assert saved["base_model.vblora_vector_bank"].shape == (H, B)


def test_topk_file_holds_indices_instead_of_logits(run):
    names = load_file(run[0] / "adapter-topk" / "adapter_model.safetensors").keys()
    assert {name.rsplit("vblora_", 1)[1] for name in names} == {
        "vector_bank",
        *(f"logits_{matrix}_topk_{part}" for matrix in "AB" for part in ("indices", "weights")),
    }


def finetune(*arguments):
    return main(["finetune", *map(str, arguments)])


def comparable(output):
    report = json.loads((output / "report.json").read_text())
    report.pop("seconds")
    return report, load_file(output / "adapter" / "adapter_model.safetensors")


def test_same_seed_gives_the_same_adapter(run, model_dir, texts, tmp_path):
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, *RATES]
    assert finetune("--output", tmp_path, *common) == 0
    (report, tensors), (again, same) = comparable(run[0]), comparable(tmp_path)
    assert again == report
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)


def test_seed_decides_the_initial_adapter(model_dir, texts, tmp_path):
    # A rate so small that the adapter stays where it started.
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, "--steps", "1", "--lr", "1e-12"]
    banks = []
    for seed in ("0", "1"):
        assert finetune("--output", tmp_path / seed, *common, "--seed", seed) == 0
        banks.append(comparable(tmp_path / seed)[1]["base_model.vblora_vector_bank"])
    assert not torch.allclose(*banks, rtol=0, atol=1e-3)


def test_triton_backend_under_the_interpreter_gives_the_references_loss(model_dir, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    (tmp_path / "text").write_text("The interpreter is slow, so this is short.")
    few = ["--steps", "2", "--batch-size", "1", "--seq-len", "8", "--target-modules", "0.self_attn.q_proj"]
    common = ["--model", model_dir, "--data", tmp_path / "text", *few, *ADAPTER, *RATES]
    assert finetune("--output", tmp_path / "reference", *common, "--backend", "reference") == 0
    # What the report says ran is what ran: the other one could not have.
    monkeypatch.delattr("vblora_triton.reference.vblora_linear")
    assert finetune("--output", tmp_path / "triton", *common, "--backend", "triton") == 0
    (report, _), (reference, _) = comparable(tmp_path / "triton"), comparable(tmp_path / "reference")
    assert (report["backend"], reference["backend"]) == ("triton", "reference")
    assert report["loss_after"] == pytest.approx(reference["loss_after"], rel=1e-5)
    assert report["loss_after"] < report["loss_before"]
    assert report["max_abs_diff"]["reloaded_full"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_run_times_the_kernels_against_the_reference(model_dir, texts, tmp_path, capsys, dtype):
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, *RATES, "--dtype", dtype]
    assert finetune("--output", tmp_path / "out", *common) == 0
    shown = capsys.readouterr().out
    assert re.search(r"forward \+ backward, triton +\d+\.\d+ ms\n +forward \+ backward, reference +\d+\.\d+ ms", shown)
    assert comparable(tmp_path / "out")[0]["backend"] == "triton"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_base_may_be_in_16_bits_while_the_adapter_stays_float32(model_dir, texts, tmp_path, dtype):
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, *RATES]
    assert finetune("--output", tmp_path / "out", *common, "--dtype", dtype) == 0
    report, tensors = comparable(tmp_path / "out")
    assert report["loss_after"] < report["loss_before"] - 0.01
    assert report["max_abs_diff"]["reloaded_full"] == 0
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_default_model_is_trained_saved_and_found_again_from_the_adapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--pretraining-steps", "2", "--steps", "2", "--batch-size", "2", "--seq-len", "32"]
    assert finetune("--output", "out", *few) == 0
    shown = capsys.readouterr()
    # No folder of Trainer's beside the output.
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads(Path("out/report.json").read_text())
    config = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert report["bytes"]["base"] == Path("out/base/model.safetensors").stat().st_size
    assert report["max_abs_diff"]["reloaded_full"] == 0
    source = torch.tensor(list("\n".join(python_source()).encode()))
    held = source[: len(source) // 32 * 32].view(-1, 32)[-256:]
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    assert base.config.use_cache
    assert report["loss_before"] == pytest.approx(loss_of(base, held), rel=1e-5)
    assert report["loss_after"] == pytest.approx(
        loss_of(PeftModel.from_pretrained(base, "out/adapter"), held), rel=1e-5
    )
    assert f"{report['loss_after']:.4f}" in shown.out
    assert "0 (exactly)" in shown.out
    assert f"{report['bytes']['topk']:,}" in shown.out
    # Nothing but the two progress bars.
    lines = [line for line in re.split(r"[\r\n]+", shown.err) if line.strip()]
    assert lines
    assert all(line.startswith(("base model: ", "adapter: ")) for line in lines)


def test_earlier_results_are_replaced_and_other_files_kept(run, model_dir, texts, tmp_path):
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


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(["q_proj", "v_proj"], 4), (["0.self_attn.q_proj"], 1), ([r".*layers\.1\.mlp\..*_proj"], 3), (["all-linear"], 14)],
    ids=["names", "one-name", "expression", "all-linear"],
)
def test_target_modules_may_be_names_an_expression_or_all(model_dir, texts, tmp_path, targets, layers):
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, "--steps", "1"]
    assert finetune("--output", tmp_path / "out", *common, "--target-modules", *targets) == 0
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * layers + 1


def test_vector_length_is_the_longest_that_fits_where_none_is_given(model_dir, texts, tmp_path):
    common = ["--model", model_dir, "--data", *texts, *TINY, "--steps", "1"]
    assert finetune("--output", tmp_path / "out", *common) == 0
    bank = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")["base_model.vblora_vector_bank"]
    assert bank.shape == (256, 32)


def test_gpt2_with_its_conv1d_layers_runs_too(model_dir, texts, tmp_path):
    config = GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "gpt2")
    common = ["--model", tmp_path / "gpt2", "--data", *texts, *TINY, *ADAPTER, *RATES]
    assert finetune("--output", tmp_path / "out", *common) == 0
    report, tensors = comparable(tmp_path / "out")
    assert report["max_abs_diff"]["reloaded_full"] == 0
    assert report["bytes"]["base"] == (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    # c_attn, c_proj, c_fc and c_proj: in and out of each, for every row of A and B.
    rows = (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)
    assert sum(tensor.numel() for tensor in tensors.values()) == R * rows // B * H + H * B


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


def everything_in(folder):
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


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


def shell(*arguments, cwd, **settings):
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "vblora_triton", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **settings)


def test_command_line_refuses_triton_without_a_gpu_in_one_line(tmp_path, model_dir, texts):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU here")
    given = ["--model", model_dir, "--data", *texts, "--output", "out", "--backend", "triton"]
    done = shell("finetune", *given, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"vblora-triton finetune: error: --backend 'triton' cannot run here: .*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_failure_while_writing_leaves_the_earlier_results_as_they_were(run, tmp_path, model_dir, texts):
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
    adapter = ["method", "r", "num-vectors", "vector-length", "topk", "target-modules"]
    training = ["steps", "batch-size", "seq-len", "lr", "vector-bank-lr", "logits-lr", "seed"]
    for option in ["model", "data", "output", *adapter, *training, "backend", "dtype"]:
        assert re.search(rf"^  --{option} ", done.stdout, re.MULTILINE), option


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


def test_held_out_sequences_are_the_end_of_the_text_and_at_most_256():
    tokens = torch.arange(2 * 3000 + 1)
    sequences = split(tokens, 2, "text")
    assert isinstance(sequences, Sequences)
    assert torch.equal(torch.cat([sequences.train, sequences.held_out]).flatten(), tokens[:6000])
    assert len(sequences.held_out) == 256
    assert len(split(tokens[:40], 2, "text").held_out) == 2
    assert len(split(tokens[:4], 2, "text").held_out) == 1

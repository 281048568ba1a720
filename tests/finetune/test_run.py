"""A whole run: what it reports and writes is recomputed here from the files, where it can be by PEFT."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from tests.finetune.case import (
    ADAPTER,
    RATES,
    REPORT_KEYS,
    SEQ_LEN,
    TINY,
    B,
    H,
    R,
    comparable,
    finetune,
    save_model,
    save_texts,
)
from vblora_triton import AdapterFileError, AutoPeftModelForCausalLM, PeftModel
from vblora_triton.finetune import options
from vblora_triton.finetune.data import python_source
from vblora_triton.kernels.launch import counted
from vblora_triton.ops import cpu


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def run(model_dir, texts, tmp_path_factory):
    """One whole run on a model of one's own: its output folder and its report."""
    output = tmp_path_factory.mktemp("run") / "deep" / "output"
    arguments = ["--model", str(model_dir), "--data", *texts, "--output", str(output), *TINY, *ADAPTER, *RATES]
    assert finetune(*arguments) == 0
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
    assert (report["method"], report["backend"], report["steps"]) == (
        "vblora",
        "triton" if torch.cuda.is_available() else "cpu",
        6,
    )
    assert report["seconds"] > 0


def test_the_report_names_what_computed_in_training_and_not_what_was_tried_before(
    model_dir, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(options, "_check_backend", lambda *arguments: "what was tried")
    common = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, *RATES]
    assert finetune("--output", tmp_path / "out", *common, "--backend", "reference") == 0
    assert comparable(tmp_path / "out")[0]["backend"] == "reference"


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
    reports = {}
    mixed, calls = cpu._mixed, []
    monkeypatch.setattr(cpu, "_mixed", lambda *arguments: calls.append("cpu") or mixed(*arguments))
    for backend, ran in (("reference", "reference"), ("triton", "triton"), ("auto", "cpu")):
        calls.clear()
        with counted() as launched:
            assert finetune("--output", tmp_path / backend, *common, "--backend", backend) == 0
        reports[backend] = comparable(tmp_path / backend)[0]
        # By what was launched, and what was called of the CPU's own code.
        assert reports[backend]["backend"] == ran
        assert (bool(launched), bool(calls)) == (ran == "triton", ran == "cpu")
    report, reference = reports["triton"], reports["reference"]
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


def test_default_model_is_trained_saved_and_found_again_wherever_they_are_moved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--pretraining-steps", "2", "--steps", "2", "--batch-size", "2", "--seq-len", "32", "--dtype", "float32"]
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
    base = AutoModelForCausalLM.from_pretrained(Path("out/adapter", config["base_model_name_or_path"]))
    assert base.config.use_cache
    assert report["loss_before"] == pytest.approx(loss_of(base, held), rel=1e-5)
    assert report["loss_after"] == pytest.approx(
        loss_of(PeftModel.from_pretrained(base, "out/adapter"), held), rel=1e-5
    )
    assert f"{report['loss_after']:.4f}" in shown.out
    assert "0 (exactly)" in shown.out
    assert f"{report['bytes']['topk']:,}" in shown.out
    # Moved away, it is whole: the base model is found from the adapter, and its text can be read and written.
    Path("out").rename("elsewhere")
    moved = AutoPeftModelForCausalLM.from_pretrained("elsewhere/adapter")
    assert report["loss_after"] == pytest.approx(loss_of(moved, held), rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained("elsewhere/base")
    text = "Größe\n\tdef f( x ): don't 🙂 "
    given = tokenizer(text, return_tensors="pt")
    assert given["input_ids"].tolist() == [list(text.encode())]
    written = moved.generate(**given, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0, : len(text.encode())]) == text
    Path("elsewhere/base").rename("lost")
    with pytest.raises(AdapterFileError, match=r"elsewhere/adapter.*'\.\./base'.*PeftModel\.from_pretrained"):
        AutoPeftModelForCausalLM.from_pretrained("elsewhere/adapter")
    # Nothing but the two progress bars.
    lines = [line for line in re.split(r"[\r\n]+", shown.err) if line.strip()]
    assert lines
    assert all(line.startswith(("base model: ", "adapter: ")) for line in lines)


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


def test_a_base_in_4_bits_is_trained_reloaded_and_merged_into(texts, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    # A CPU with AVX512-BF16 takes rows of whole blocks, of 64.
    model_dir = save_model(tmp_path / "model", wide=64)
    arguments = ["--model", model_dir, "--data", *texts, *TINY, *ADAPTER, *RATES, "--load-in-4bit"]
    assert finetune(*arguments, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loss_after"] < report["loss_before"]
    assert report["max_abs_diff"]["reloaded_full"] == 0
    # Half a byte and scales for each weight, but for embedding and head, which stay as they are.
    whole = sum(t.numel() for t in AutoModelForCausalLM.from_pretrained(model_dir).parameters()) * 4
    assert report["bytes"]["base"] < 0.75 * whole
    assert "merge into the unquantised model" in capsys.readouterr().out


def test_4_bits_without_bitsandbytes_are_refused_before_anything_is_read(
    model_dir, texts, tmp_path, monkeypatch, capsys
):
    found = options.importlib.util.find_spec
    monkeypatch.setattr(
        options.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    assert finetune("--model", "nowhere", "--data", *texts, "--load-in-4bit", "--output", tmp_path / "out") == 2
    assert "pip install 'vblora-triton[bnb]'" in capsys.readouterr().err

"""A whole run with --method vera: what it reports and writes is recomputed here from the files."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.finetune.case import REPORT_KEYS, SEQ_LEN, TINY, finetune, save_model, save_texts
from vblora_triton.finetune.options import Options, check
from vblora_triton.methods import methods

R, KEY, SMALL = 8, 5, "adapter-without-projections"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    common = ["--method", "vera", "--model", save_model(folder / "model"), "--data", *save_texts(folder), *TINY]
    return [*common, "--r", R, "--projection-prng-key", KEY, "--lambda-lr", "0.1"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory):
    """One whole run: its output folder and its report."""
    output = tmp_path_factory.mktemp("run")
    assert finetune(*given, "--output", output) == 0
    return output, json.loads((output / "report.json").read_text())


def base_of(given):
    return AutoModelForCausalLM.from_pretrained(given[given.index("--model") + 1])


def test_report_and_folder_hold_the_documented_names_and_the_sizes_of_the_files(run):
    output, report = run
    assert set(report) == REPORT_KEYS
    assert (report["method"], report["backend"]) == ("vera", "triton" if torch.cuda.is_available() else "cpu")
    assert set(report["bytes"]) == {"base", "full", "without_projections", "lora"}
    assert set(report["max_abs_diff"]) == {"reloaded_full", "reloaded_without_projections", "merged"}
    assert {path.name for path in output.iterdir()} - {"loss.png"} == {"adapter", SMALL, "report.json"}
    for key, folder in (("full", "adapter"), ("without_projections", SMALL)):
        assert report["bytes"][key] == (output / folder / "adapter_model.safetensors").stat().st_size


def test_both_files_hold_the_same_scales_and_one_the_projections(run):
    output, report = run
    full, small = (load_file(output / name / "adapter_model.safetensors") for name in ("adapter", SMALL))
    assert full.keys() - small.keys() == {"base_model.vera_A", "base_model.vera_B"}
    assert all(torch.equal(full[name], small[name]) for name in small)
    assert report["trainable_parameters"] == sum(tensor.numel() for tensor in small.values())
    for folder, saved in (("adapter", True), (SMALL, False)):
        config = json.loads((output / folder / "adapter_config.json").read_text())
        assert (config["save_projection"], config["projection_prng_key"], config["r"]) == (saved, KEY, R)


def test_nothing_is_lost_by_reloading_either_and_little_by_merging(run):
    differences = run[1]["max_abs_diff"]
    assert differences["reloaded_full"] == differences["reloaded_without_projections"] == 0
    assert 0 < differences["merged"] <= 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Specified to not")
@pytest.mark.parametrize("folder", ["adapter", SMALL])
def test_loss_after_is_that_of_the_saved_adapter_in_peft(run, given, folder):
    peft = pytest.importorskip("peft")
    output, report = run
    at = {name: given.index(name) for name in ("--model", "--data")}
    options = Options(
        output=str(output), model=str(given[at["--model"] + 1]), data=tuple(given[at["--data"] + 1 :][:2])
    )
    held_out = check(Options(**vars(options) | {"seq_len": SEQ_LEN})).sequences.held_out
    adapted = peft.PeftModel.from_pretrained(base_of(given), output / folder).eval()
    with torch.no_grad():
        logits = adapted(held_out).logits.double()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()).item()
    assert report["loss_after"] == pytest.approx(loss, rel=1e-5)
    assert report["loss_after"] < report["loss_before"] - 0.01


def test_the_table_speaks_of_vera_and_compares_with_lora_of_rank_4(given, run, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    assert finetune(*given, "--output", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "VB-LoRA" not in shown
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base_of(given), config).save_pretrained(tmp_path / "lora")
    report = run[1]
    assert report["bytes"]["lora"] == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size
    for label, key in (
        ("LoRA, r=4, same layers (computed)", "lora"),
        ("VeRA adapter, with projections", "full"),
        ("VeRA adapter, without projections", "without_projections"),
    ):
        assert re.search(rf"{re.escape(label)} +{report['bytes'][key]:,} ", shown), label
    assert len(re.findall(r"reloaded from .* 0 \(exactly\)", shown)) == 2


def test_a_run_of_the_other_method_takes_the_place_of_an_earlier_one(run, given, tmp_path):
    others = [argument for argument in given if argument not in ("--projection-prng-key", KEY, "--lambda-lr", "0.1")]
    others[others.index("vera")] = "vblora"
    assert finetune(*given, "--output", tmp_path, "--steps", "1") == 0
    assert finetune(*others, "--output", tmp_path, "--steps", "1") == 0
    assert {path.name for path in tmp_path.iterdir()} - {"loss.png"} == {"adapter", "adapter-topk", "report.json"}


@pytest.mark.parametrize(
    ("model", "asked", "expected"),
    [
        (True, {}, (256, 0, 4e-3)),
        (False, {}, (methods()["vera"].options["r"].small, 0, methods()["vera"].rates["lambda_lr"].small)),
        (True, {"lr": 0.5}, (256, 0, 0.5)),
        (True, {"lr": 0.5, "lambda_lr": 0.25, "r": 3, "projection_prng_key": 0}, (3, 0, 0.25)),
    ],
    ids=str,
)
def test_what_is_not_given_is_the_papers_or_fits_the_small_model(model, asked, expected, tmp_path):
    folder = str(save_model(tmp_path / "model")) if model else None
    plan = check(Options(output=str(tmp_path / "out"), model=folder, method="vera", seq_len=32, **asked))
    assert (plan.config.r, plan.config.projection_prng_key, plan.rates["lambda_lr"]) == expected

"""A method is a folder and a line: a third one, tests/toy_method, does all that the others do once it is registered."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.finetune.case import REPORT_KEYS, TINY, finetune, save_model, save_texts
from tests.models import outputs, some_ids, tiny_llama
from tests.toy_method.config import ToyConfig
from vblora_triton import PeftConfig, PeftModel, get_peft_model, parameter_groups
from vblora_triton.cli import main
from vblora_triton.methods import register

GAIN = 3


@pytest.fixture
def registered(monkeypatch):
    """Add the line that methods.py would have, for the time of a test."""
    monkeypatch.setattr(PeftConfig, "known", dict(PeftConfig.known))
    register("tests.toy_method.config:ToyConfig")


def changed_by_hand(base, file):
    """A plain model with gain * B A of each pair in the file added to the weight that it is named after."""
    tensors, weights = load_file(file), base.state_dict()
    keys = [key for key in tensors if key.endswith(".toy_A")]
    assert 2 * len(keys) == len(tensors)
    for key in keys:
        A, B = tensors[key].double(), tensors[key.replace("toy_A", "toy_B")].double()
        weight = weights[key.removeprefix("base_model.model.").replace(".toy_A", ".weight")]
        weight.copy_((weight.double() + GAIN * B @ A).to(weight.dtype))
    return base.eval()


def trained_model():
    model = get_peft_model(tiny_llama(), ToyConfig(r=4, gain=GAIN))
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(parameter_groups(model, toy_lr=0.3))
    for _ in range(3):
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
        optimizer.step()
    return model.eval()


def test_without_its_line_nothing_knows_it(capsys):
    with pytest.raises(ValueError, match="TOY"):
        ToyConfig()
    with pytest.raises(ValueError, match="'TOY'; supported: VBLORA, VERA"):
        PeftConfig.from_dict({"peft_type": "TOY"})
    with pytest.raises(TypeError, match=r"`toy_lr` .* vector_bank_lr, logits_lr, lambda_lr"):
        parameter_groups(tiny_llama(), toy_lr=0.1)
    with pytest.raises(SystemExit):
        main(["finetune", "--method", "toy", "--output", "never"])
    assert "invalid choice: 'toy' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("half", [False, True], ids=["full", "half"])
def test_it_trains_saves_reloads_and_merges(registered, tmp_path, half):
    model = trained_model()
    expected = outputs(model)
    assert (expected - outputs(tiny_llama())).abs().max() > 0.01
    model.peft_config["default"].save_half = half
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16 if half else torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOY"
    assert "# Toy LoRA adapter\n" in (tmp_path / "README.md").read_text()

    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert type(again.base_model).__name__ == "ToyModel"
    assert again.get_model_status().peft_types == {"default": "TOY"}
    if not half:
        assert torch.equal(outputs(again), expected)
    by_hand = outputs(changed_by_hand(tiny_llama(), file))
    torch.testing.assert_close(outputs(again), by_hand, rtol=1e-4, atol=1e-5)
    merged = again.merge_and_unload()
    assert not [name for name in merged.state_dict() if "toy" in name]
    torch.testing.assert_close(outputs(merged), by_hand, rtol=1e-4, atol=1e-5)


def test_what_is_saved_is_counted_and_said(registered, capsys):
    model = get_peft_model(tiny_llama(), ToyConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    own = 2 * 4 * (64 + 64)
    assert model.get_nb_savable_parameters() == (own, 48 * 64)
    model.peft_config["default"].save_half = True
    assert model.get_nb_savable_parameters() == (own // 2, 48 * 64)
    model.print_savable_parameters()
    assert "Toy LoRA params to-be-saved" in capsys.readouterr().out


def test_its_parameters_are_a_group_at_their_own_rate(registered):
    groups = parameter_groups(get_peft_model(tiny_llama(), ToyConfig(target_modules=["q_proj"])))
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [("toy", 5e-2, 4)]


def test_the_command_trains_it_with_its_options(registered, tmp_path, capsys):
    base = save_model(tmp_path / "base")
    given = ["--method", "toy", "--model", base, "--data", *save_texts(tmp_path), *TINY, "--r", "4", "--toy-lr", "0.1"]
    assert finetune(*given, "--output", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report) == REPORT_KEYS
    assert (report["method"], set(report["bytes"])) == ("toy", {"base", "full", "half", "lora"})
    assert report["loss_after"] < report["loss_before"] - 0.01
    assert report["max_abs_diff"]["reloaded_full"] == 0
    assert "Toy LoRA adapter, halved" in capsys.readouterr().out
    for folder in ("adapter", "adapter-half"):
        stored = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        assert (stored["peft_type"], stored["r"], stored["gain"]) == ("TOY", 4, GAIN)
        plain = AutoModelForCausalLM.from_pretrained(base)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out" / folder)
        by_hand = outputs(changed_by_hand(plain, tmp_path / "out" / folder / "adapter_model.safetensors"))
        torch.testing.assert_close(outputs(adapted), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["vblora", "toy"])
def test_help_and_errors_speak_of_it(registered, method, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--method {vblora,vera,toy}" in shown
    assert "VB-LoRA or VeRA or Toy LoRA" in shown
    assert "--gain G toy: factor of the update (default: 3)" in shown
    assert "--toy-lr LR toy: learning rate of A and B (default: 0.05)" in shown
    assert "adapter-half/ Toy LoRA's A and B in float16" in shown
    strange = {"vblora": ["--gain", "2"], "toy": ["--topk", "2"]}[method]
    assert finetune("--method", method, "--output", tmp_path / "out", *strange) == 2
    assert f"{strange[0]} is an option of" in capsys.readouterr().err

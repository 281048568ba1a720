"""Adapters looked into, compared and packed; what is said of them is counted by hand from the files."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.exchange.adapters import CASES, save
from tests.models import outputs
from vblora_triton import PeftModel, convert_to_lora, diff_adapters, inspect_adapter, pack_adapter
from vblora_triton.exchange.inspection import inspection_lines

pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Case -> saved adapter and its model."""
    cases = ("vblora-full-linear", "vera-full-linear", "vera-bare-linear")
    return {case: save(tmp_path_factory.mktemp(case), *CASES[case]) for case in cases}


def test_bank_usage_is_that_of_the_files_logits(saved):
    report = inspect_adapter(saved["vblora-full-linear"].adapter)
    tensors = load_file(f"{saved['vblora-full-linear'].adapter}/{FILE}")
    counts, layers, entropies = [0] * 10, {}, []
    for key, logits in tensors.items():
        if "logits" not in key:
            continue
        layer = key.removeprefix("base_model.model.").rpartition(".")[0]
        for row in logits.reshape(-1, 10).double():
            best = sorted(range(10), key=lambda n: -row[n])[:3]
            weights = [math.exp(row[n]) / sum(math.exp(row[m]) for m in best) for n in best]
            entropies.append(-sum(w * math.log2(w) for w in weights))
            for vector in best:
                counts[vector] += 1
                own = layers.setdefault(layer, {})
                own[str(vector)] = own.get(str(vector), 0) + 1
    values = report["values"]
    assert values["counts"] == counts
    assert values["layers"] == layers
    assert values["used_vectors"] == sum(count > 0 for count in counts)
    assert values["selections"] == len(entropies)
    assert values["entropy_of_selections"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-6)
    shares = [count / sum(counts) for count in counts if count]
    assert values["entropy_of_usage"] == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert sum(values["weights"]) == pytest.approx(len(entropies), abs=1e-3)


@pytest.mark.parametrize("case", ["vblora-full-linear", "vera-full-linear", "vera-bare-linear"])
def test_sizes_are_those_of_the_file(saved, case):
    adapter = saved[case].adapter
    report = inspect_adapter(adapter)
    tensors = load_file(f"{adapter}/{FILE}")
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["trainable_further"]
    assert report["base_model"] == saved[case].base
    assert report["modules"]["model.layers.0.mlp.down_proj"] == [96, 64]
    assert len(report["modules"]) == 4
    json.dumps(report)
    shown = "\n".join(inspection_lines(report))
    for part in (report["method"], f"{report['parameters']:,d}", f"{report['bytes']:,d}", "2 q_proj, 2 down_proj"):
        assert part in shown


def test_without_the_base_what_only_it_knows_is_left_open(saved, tmp_path):
    adapter = Path(saved["vera-full-linear"].adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "not/here"}))
    (tmp_path / FILE).write_bytes((adapter / FILE).read_bytes())
    report = inspect_adapter(tmp_path)
    assert (report["checked_against_base"], report["modules"]["model.layers.0.mlp.down_proj"]) == (False, [None, 64])
    assert inspect_adapter(tmp_path, saved["vera-full-linear"].base)["checked_against_base"]


def test_plot_is_a_picture_and_vera_has_no_bank_to_draw(saved, tmp_path):
    pytest.importorskip("matplotlib")
    inspect_adapter(saved["vblora-full-linear"].adapter, plot=tmp_path / "bank.png")
    assert (tmp_path / "bank.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(ValueError, match="no vector bank"):
        inspect_adapter(saved["vera-full-linear"].adapter, plot=tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"matplotlib .* writes"):
        inspect_adapter(saved["vblora-full-linear"].adapter, plot=tmp_path / "bank.jpgg")
    assert [path.name for path in tmp_path.iterdir()] == ["bank.png"]


@pytest.mark.parametrize(("case", "form"), [("vblora-full-linear", "top-k"), ("vera-full-linear", "without")])
def test_packed_adapter_is_smaller_computes_the_same_and_loads_in_peft(saved, case, form, tmp_path):
    done = pack_adapter(saved[case].adapter, tmp_path / "small")
    assert form in done.form
    assert done.bytes_after == (tmp_path / "small" / FILE).stat().st_size < done.bytes_before
    base = lambda: AutoModelForCausalLM.from_pretrained(saved[case].base)  # noqa: E731
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path / "small")), saved[case].logits)
    with pytest.raises(ValueError, match="in that form already"):
        pack_adapter(tmp_path / "small", tmp_path / "smaller")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert not diff_adapters(saved[case].adapter, tmp_path / "small")["same"]
    peft = pytest.importorskip("peft")
    torch.testing.assert_close(outputs(peft.PeftModel.from_pretrained(base(), tmp_path / "small")), saved[case].logits)


def test_diff_names_what_differs_and_by_how_much(saved, tmp_path):
    first = saved["vblora-full-linear"].adapter
    assert diff_adapters(first, first)["same"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["vblora-full-linear"].base), first)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    before = layer.get_delta_weight("default")
    with torch.no_grad():
        layer.vblora_logits_A["default"][0, 0, 0] += 2.5
    model.peft_config["default"].vblora_dropout = 0.25
    model.save_pretrained(tmp_path)
    report = diff_adapters(first, tmp_path)
    name = "model.layers.1.self_attn.q_proj"
    assert report["settings"] == {"vblora_dropout": [0.0, 0.25]}
    assert report["tensors"] == {f"base_model.model.{name}.vblora_logits_A": pytest.approx(2.5, abs=1e-5)}
    expected = (layer.get_delta_weight("default") - before).norm() / before.norm()
    assert report["layers"] == {name: pytest.approx(expected.item(), rel=1e-3)}
    assert not report["only_in_first"] + report["only_in_second"]


def test_a_third_method_is_converted_by_its_own_folder_alone(tmp_path, monkeypatch):
    from tests.models import tiny_llama
    from tests.test_methods import ToyConfig, trained_model
    from vblora_triton import PeftConfig
    from vblora_triton.methods import register

    monkeypatch.setattr(PeftConfig, "known", dict(PeftConfig.known))
    register("tests.toy_method.config:ToyConfig")
    assert ToyConfig.type_name == "TOY"
    model = trained_model()
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path / "toy")
    assert inspect_adapter(tmp_path / "toy", tiny_llama())["method"] == "Toy LoRA"
    convert_to_lora(tmp_path / "toy", tmp_path / "lora")
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=0, atol=1e-5)

"""What README.md shows works."""

import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OPTConfig

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs_and_merges_what_it_saved(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=256, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=256
    )
    original = AutoModelForCausalLM.from_config(config)
    original.save_pretrained(tmp_path / "facebook" / "opt-125m")
    # In place of the download.
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["vblora_triton"].is_patched()
    names["vblora_triton"].unpatch_peft()
    assert isinstance(names["optimizer"], torch.optim.AdamW)
    assert {group["name"] for group in names["optimizer"].param_groups} == {"lambda"}
    assert (tmp_path / "vera-adapter" / "adapter_model.safetensors").is_file()
    tokens = torch.arange(8)[None]
    merged, adapted = names["merged"].eval()(tokens).logits, names["model"].eval()(tokens).logits
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)
    assert (merged - original.eval()(tokens).logits).abs().max() > 1e-4


def test_map_of_the_readme_names_only_what_exists():
    root = Path(__file__).parents[1]
    (code_map,) = re.findall(r"## Map of the code\n\n```\n(.*?)```", README, re.DOTALL)
    package = False
    for line in code_map.splitlines():
        name = line.split()[0]
        package = line.startswith("  ")
        assert (root / "vblora_triton" / name if package else root / name).exists(), line


def test_table_of_the_readme_holds_the_numbers_of_its_report():
    report = json.loads((Path(__file__).parents[1] / "bench" / "results" / "demo.json").read_text())
    lines = {line[:36].strip(): line[36:].split()[0] for line in README.splitlines() if line.startswith("  ")}
    assert float(lines["before (base model alone)"]) == round(report["loss_before"], 4)
    assert float(lines["after"]) == round(report["loss_after"], 4)
    sizes = [int(value.replace(",", "")) for name, value in lines.items() if "," in value and value[0].isdigit()]
    assert sizes == [report["bytes"][name] for name in ("base", "lora", "full", "topk")]
    for name, key in (("top-k file", "reloaded_topk"), ("full file", "reloaded_full")):
        assert float(lines[f"reloaded from the {name}"]) == float(f"{report['max_abs_diff'][key]:.1e}")
    assert float(lines["merged into the base"]) == float(f"{report['max_abs_diff']['merged']:.1e}")

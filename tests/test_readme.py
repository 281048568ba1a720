"""What README.md shows works."""

import functools
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

import vblora_triton
from vblora_triton import cli
from vblora_triton.methods import tuner_class

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


PAGES = ["train", "quantised", "several-gpus", "compile", "merge", "share", "many-adapters", "trouble"]


def save_stand_in(folder):
    """Write a small model in the place of the one that the pages download, and return it."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=256, ffn_dim=512, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=256
    )
    original = AutoModelForCausalLM.from_config(config)
    original.save_pretrained(folder / "facebook" / "opt-125m")
    return original


def commands(text: str) -> list[list[str]]:
    """The command lines of vblora-triton in a page, but for those that only ask for help."""
    lines = re.findall(r"^(?:vblora-triton|(?:torchrun|accelerate) .* -m vblora_triton) (.*)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines if "--help" not in line and "..." not in line]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
def test_commands_that_are_shown_have_options_that_there_are(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for arguments in commands(text):
        cli._parser().parse_args(arguments)
    assert commands(text) or page not in ("README.md", "docs/train.md", "docs/several-gpus.md")


def test_options_of_accelerate_that_are_shown_are_its_own():
    text = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    shown = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("accelerate launch")]
    parsed = [launch_command_parser().parse_args(options) for options in shown]
    assert [(p.multi_gpu, p.use_fsdp, p.use_deepspeed) for p in parsed] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


@pytest.mark.filterwarnings("ignore:The base weights are quantised")
@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    save_stand_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    # Whether it is one graph, and not minutes of a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    if page == "quantised":
        pytest.importorskip("bitsandbytes")
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert blocks or page == "trouble"
    if page == "merge":
        plain = AutoModelForCausalLM.from_pretrained("merged")
        tokens = torch.arange(8)[None]
        torch.testing.assert_close(plain(tokens).logits, names["model"](tokens).logits)
    if page == "compile":
        with torch.no_grad():
            expected = names["model"](torch.arange(10).view(1, 10)).logits
        torch.testing.assert_close(names["logits"], expected)
    if page == "many-adapters":
        assert names["model"].active_adapters == ["german"]


def test_links_of_the_readme_and_the_pages_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in (*PAGES, "other-engines"))):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_settings_have_the_counts_of_the_adapters_themselves():
    """Counted by the methods on layers without values."""
    rows = re.findall(r"^\| [\d.]+ [MB] \((\d+) wide, (\d+) blocks(?:, v to (\d+))?\) (.*)$", README, re.MULTILINE)
    assert len(rows) == 3
    for wide, blocks, narrow, rest in rows:
        with torch.device("meta"):
            sizes = {"q_proj": int(wide), "v_proj": int(narrow or wide)}
            model = nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(int(wide), out) for name, out in sizes.items()})
                for _ in range(int(blocks))
            )
        vblora, count, vera, small, lora = [cell.strip(" `") for cell in rest.strip("| ").split("|")]
        for kind, settings, wanted in (("VBLoRAConfig", vblora, count), ("VeraConfig", vera, small)):
            config = eval(f"{kind}({settings}, target_modules=['q_proj', 'v_proj'])", vars(vblora_triton))
            tuner = tuner_class(config)
            shapes = tuner.file_shapes(tuner.plan(config, model))
            trained = sum(math.prod(shape) for key, shape in shapes.items() if not key.endswith(("vera_A", "vera_B")))
            assert f"{trained:,}" == wanted
        assert f"{sum(4 * sum(module.weight.shape) for block in model for module in block.values()):,}" == lora


def test_python_of_the_readme_runs_and_merges_what_it_saved(tmp_path, monkeypatch):
    original = save_stand_in(tmp_path)
    # In place of the download, and of `make demo`.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("def main(): return 1\n" * 20)
    few = ["--pretraining-steps", "1", "--steps", "1", "--batch-size", "1", "--seq-len", "32", "--data", "text"]
    assert cli.main(["finetune", "--output", "build/demo", *few]) == 0
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


def on_the_map() -> set[str]:
    """Every file and folder that the map names, as a path: the first word of a line, and each `name.py` beside it.

    A line that is indented is about something in vblora_triton/, and one further in goes on with the line above it.
    What stands beside a folder is in that folder; what stands beside a file is next to it.
    """
    (code_map,) = re.findall(r"## Map of the code\n\n```\n(.*?)```", README, re.DOTALL)
    named, folder = set(), ""
    for line in code_map.splitlines():
        text = line
        if line[:3].strip():
            name, _, text = line.strip().partition(" ")
            parent = "vblora_triton/" if line.startswith("  ") else ""
            named.add((parent + name).rstrip("/"))
            folder = parent + name if name.endswith("/") else parent
        named |= {folder + word for word in re.findall(r"[\w/]+\.py", text) if word != "__init__.py"}
    return named


def test_map_of_the_readme_is_the_tree():
    named = on_the_map()
    gone = {name for name in named if not (ROOT / name).exists()}
    folders = {*(path.parent for path in ROOT.glob("[!.]*/*.py")), *(ROOT / "vblora_triton").glob("[!_]*")}
    modules = {path for top in ("kernels", "vblora_triton", "tools") for path in (ROOT / top).rglob("[!_]*.py")}
    there = {path.relative_to(ROOT).as_posix() for path in modules | {path for path in folders if path.is_dir()}}
    missing = {name for name in there if not name.startswith("vblora_triton/kernels/")} - named
    assert not gone | missing, f"gone: {sorted(gone)}; not on the map: {sorted(missing)}"


def test_paths_of_contributing_exist():
    gone = []
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        folders = [ROOT, ROOT / "vblora_triton"]
        for name in re.findall(r"`([\w./]+(?:/|\.py|\.md|\.txt))`", line):
            found = next((folder / name for folder in reversed(folders) if (folder / name).exists()), None)
            gone += [] if found else [name]
            # What the rest of the line names may be in it.
            folders += [found] if found and found.is_dir() else []
    assert not gone


def test_table_of_the_readme_holds_the_numbers_of_its_report():
    report = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    rows = [line for line in README.splitlines() if line.startswith("  ") and line[36:].strip()]
    lines = {line[:36].strip(): line[36:].split()[0] for line in rows}
    assert float(lines["before (base model alone)"]) == round(report["loss_before"], 4)
    assert float(lines["after"]) == round(report["loss_after"], 4)
    sizes = [int(value.replace(",", "")) for name, value in lines.items() if "," in value and value[0].isdigit()]
    assert sizes == [report["bytes"][name] for name in ("base", "lora", "full", "topk")]
    for name, key in (("top-k file", "reloaded_topk"), ("full file", "reloaded_full")):
        assert float(lines[f"reloaded from the {name}"]) == float(f"{report['max_abs_diff'][key]:.1e}")
    assert float(lines["merged into the base"]) == float(f"{report['max_abs_diff']['merged']:.1e}")

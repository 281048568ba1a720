"""What a run says at its end: words that can be pasted, and warnings with numbers."""

import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.finetune.case import ADAPTER, TINY, comparable, finetune, save_model, save_texts


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    return ["--model", save_model(folder / "my model's"), "--data", *save_texts(folder), *TINY, "--steps", "1"]


def test_what_is_printed_last_loads_generates_and_merges(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert finetune(*given, *ADAPTER, "--output", 'an "output"') == 0
    code = capsys.readouterr().out.partition("To load it, generate and merge, in Python:\n\n")[2]
    names = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / 'an "output"' / "merged")
    tokens = torch.arange(9)[None]
    torch.testing.assert_close(merged(tokens).logits, names["model"].base_model.model(tokens).logits, rtol=0, atol=1e-5)


def test_without_matplotlib_the_run_says_so_and_how_to_get_it(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert finetune(*given, *ADAPTER, "--output", tmp_path) == 0
    assert "No loss.png: matplotlib is not installed; `pip install" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--num-vectors", "256", "--vector-length", "16"],
            r"Adapter-topk/ has it in {topk}; a lower --num-vectors or",
        ),
        (["--method", "vera"], r"Adapter-without-projections/ has it in {without_projections}; a lower --r would"),
        (["--num-vectors", "4", "--vector-length", "32", "--r", "4"], None),
    ],
    ids=["vblora", "vera", "smaller"],
)
def test_an_adapter_that_is_larger_than_loras_is_warned_of_with_numbers(options, words, given, tmp_path, capsys):
    assert finetune(*given, *options, "--output", tmp_path) == 0
    shown, sizes = capsys.readouterr().out, comparable(tmp_path)[0]["bytes"]
    assert (sizes["full"] > sizes["lora"]) == (words is not None) == ("Warning" in shown)
    if words:
        numbers = {name: f"{size:,}" for name, size in sizes.items()}
        head = rf"Warning: the full adapter's file has {numbers['full']} bytes, more than the {numbers['lora']} of LoRA"
        assert re.search(head + r" with r=\d+ on the same layers\. " + words.format(**numbers), shown)

"""A model, texts and options so small that a whole run of the command takes a second."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from vblora_triton.cli import main

SEQ_LEN, R, H, B, K = 16, 2, 24, 16, 3
# In float32 on a GPU too, where it is not the default: results are compared to its digits.
TINY = ["--steps", "6", "--batch-size", "4", "--seq-len", str(SEQ_LEN), "--dtype", "float32"]
ADAPTER = ["--r", str(R), "--num-vectors", str(H), "--vector-length", str(B), "--topk", str(K)]
RATES = ["--vector-bank-lr", "3e-2", "--logits-lr", "3e-1"]
MEASURED = {"loss_before", "loss_after", "trainable_parameters", "bytes", "max_abs_diff"}
REPORT_KEYS = {"method", "backend", "steps", "seconds", *MEASURED}


def save_model(folder: Path, *, vocab_size: int = 257, tokenizer: bool = True, wide: int = 32) -> Path:
    """Write a tiny Llama, with a tokenizer that gives UTF-8's bytes in an order of its own, and 256 for the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=wide, intermediate_size=2 * wide, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        byte_level = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
        byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<end>").save_pretrained(folder)
    return folder


def save_texts(folder: Path) -> list[str]:
    """Write two texts, one of them not only ASCII."""
    (folder / "one.txt").write_text("She sells sea shells. " * 40, encoding="utf-8")
    (folder / "two.txt").write_text("Größe zählt — nicht. " * 60, encoding="utf-8")
    return [str(folder / "one.txt"), str(folder / "two.txt")]


def finetune(*arguments: object) -> int:
    """Run the command and return its exit code."""
    return main(["finetune", *map(str, arguments)])


def comparable(output: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the report without the time it took, and the tensors of the adapter."""
    report = json.loads((output / "report.json").read_text())
    report.pop("seconds")
    return report, load_file(output / "adapter" / "adapter_model.safetensors")


def everything_in(folder: Path) -> dict[Path, int | None]:
    """Return the files and folders below a folder, files with the time they were written."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}

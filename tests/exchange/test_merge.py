"""Merging on disk: the same bits as merge_and_unload(), complete, and resumed after a kill."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.exchange.adapters import CASES, LLAMA, VBLORA, save
from tests.finetune.case import save_model
from tests.models import VOCABULARY, enlarge, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from vblora_triton import PeftModel, VBLoRAConfig, VeraConfig, get_peft_model, merge_to_folder
from vblora_triton.exchange.shards import Shards

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:`save_projection` is False")


def merged_in_memory(auto, base, adapter, **options):
    return PeftModel.from_pretrained(auto.from_pretrained(base, **options), adapter).merge_and_unload()


def assert_same_bits(folder, model, auto=AutoModelForCausalLM, **options):
    written, wanted = auto.from_pretrained(folder, **options).state_dict(), model.state_dict()
    assert written.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert written[key].dtype == tensor.dtype, key
        assert torch.equal(written[key], tensor), key


@pytest.mark.parametrize("case", ["vblora-full-linear", "vblora-topk-conv1d", "vera-bare-linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_hold_the_bits_of_merge_and_unload(case, dtype, tmp_path):
    make, *rest = CASES[case]
    saved = save(tmp_path, lambda: make().to(dtype), *rest, max_shard_size="30KB")
    done = merge_to_folder(saved.adapter, tmp_path / "merged", saved.base)
    assert (done.shards > 2, done.resumed, done.layers >= 4) == (True, 0, True)
    model = merged_in_memory(AutoModelForCausalLM, saved.base, saved.adapter)
    assert_same_bits(tmp_path / "merged", model)
    assert next(model.parameters()).dtype == dtype
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(os.listdir(saved.base))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "merged"]


@pytest.mark.parametrize("saved_whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_a_head_trained_apart_from_its_embedding_stays_apart(saved_whole, tmp_path):
    base = tiny_llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    config = VBLoRAConfig(**VBLORA | LLAMA, modules_to_save=saved_whole, task_type="CAUSAL_LM")
    model = enlarge(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5 if "lm_head" in name else -1)
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    assert_same_bits(tmp_path / "merged", model.merge_and_unload())
    # Not every reader asks the files.
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_biases_and_the_head_of_a_task_are_written(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    config = VeraConfig(r=5, bias="all", target_modules=["c_attn"], task_type="CAUSAL_LM")
    model = enlarge(get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    assert_same_bits(tmp_path / "merged", model.merge_and_unload())

    # A head that the base model's files lack.
    whole = tiny_bert()
    tensors = {key: t for key, t in whole.state_dict().items() if "classifier" not in key}
    whole.save_pretrained(tmp_path / "bert", state_dict=tensors)
    config = VBLoRAConfig(**VBLORA, target_modules=["query"], task_type="SEQ_CLS")
    model = enlarge(get_peft_model(whole, config))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "bert")
    model.save_pretrained(tmp_path / "classifier")
    merge_to_folder(tmp_path / "classifier", tmp_path / "merged-bert")
    options = {"num_labels": 3}
    assert_same_bits(tmp_path / "merged-bert", model.merge_and_unload(), AutoModelForSequenceClassification, **options)


def test_tokenizer_generation_settings_and_code_come_along(tmp_path):
    base = save_model(tmp_path / "base")
    GenerationConfig(max_new_tokens=7).save_pretrained(base)
    for name in ("modeling_own.py", "chat_template.jinja", "LICENSE", "pytorch_model.bin", "README.md"):
        (base / name).write_text(name)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), VBLoRAConfig(**VBLORA | LLAMA))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<end>"})
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<end>"
    names = set(os.listdir(tmp_path / "merged"))
    assert {"modeling_own.py", "LICENSE", "config.json", "model.safetensors"} <= names
    assert not names & {"pytorch_model.bin", "README.md", "adapter_config.json"}


# Each in a process of its own. The first stops in the middle of the third file, to be killed there; the second tells
# what a large merge takes beyond a small one.
STOP = """
import sys, time
from vblora_triton.exchange import merge, shards
read = shards.Shards.read
def stopping(self, name):
    if self.places[name].file == self.files[2]:
        print("stopped", flush=True)
        time.sleep(100)
    return read(self, name)
shards.Shards.read = stopping
merge.merge_to_folder(*sys.argv[1:4])
"""
MEASURE = """
import sys
from vblora_triton import merge_to_folder
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
merge_to_folder(*sys.argv[4:7])
# The peak counts from here on.
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
merge_to_folder(*sys.argv[1:4])
print(status("VmHWM") - before)
"""


def elsewhere(script, *arguments):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An adapter for a model of 70 MB in shards of 16 MB, none of its weights larger than 3 MB."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY))
    base.save_pretrained(folder / "base", max_shard_size="16MB")
    config = VBLoRAConfig(r=4, num_vectors=16, vector_length=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = enlarge(get_peft_model(base, config))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder


def test_killed_merge_goes_on_where_it_was(large, tmp_path):
    adapter, base, out = large / "adapter", large / "base", tmp_path / "merged"
    run = elsewhere(STOP, adapter, out, base)
    assert run.stdout.readline() == "stopped\n"
    run.kill()
    run.wait()
    run.stdout.close()
    assert os.listdir(tmp_path) == [".merged.unfinished"]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".merged.unfinished").glob("[!.]*.safetensors")}
    assert len(kept) == 2

    assert merge_to_folder(adapter, out, base).resumed == 2
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert_same_bits(out, merged_in_memory(AutoModelForCausalLM, base, adapter))
    assert sorted(os.listdir(tmp_path)) == ["merged"]
    assert sorted(os.listdir(out)) == sorted(os.listdir(base))


def test_what_was_left_of_another_merge_is_not_taken_up(tmp_path, monkeypatch):
    saved = save(tmp_path, *CASES["vblora-full-linear"], max_shard_size="30KB")
    other = enlarge(PeftModel.from_pretrained(tiny_llama(), saved.adapter, is_trainable=True), seed=3)
    other.save_pretrained(tmp_path / "other")

    def interrupted(self, name):
        if "layers.1." in name:
            raise KeyboardInterrupt
        return read(self, name)

    read = Shards.read
    monkeypatch.setattr(Shards, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_to_folder(saved.adapter, tmp_path / "merged", saved.base)
    monkeypatch.undo()
    assert list((tmp_path / ".merged.unfinished").glob("[!.]*.safetensors"))
    assert merge_to_folder(tmp_path / "other", tmp_path / "merged", saved.base).resumed == 0
    assert_same_bits(tmp_path / "merged", merged_in_memory(AutoModelForCausalLM, saved.base, tmp_path / "other"))


def test_memory_stays_below_the_largest_file(large, tmp_path):
    small = save(tmp_path / "small", *CASES["vblora-full-linear"])
    run = elsewhere(
        MEASURE, large / "adapter", tmp_path / "merged", large / "base", small.adapter, tmp_path / "little", small.base
    )
    grown = int(run.communicate()[0])
    sizes = [path.stat().st_size for path in (large / "base").glob("*.safetensors")]
    assert sum(sizes) > 4 * max(sizes)
    assert grown < 1.3 * max(sizes), (grown, max(sizes))
    # Something was measured.
    assert grown > 2**20


@pytest.mark.filterwarnings("ignore:.*which this model does not have")
def test_unfit_bases_are_refused_by_name_and_nothing_is_left(tmp_path):
    saved = save(tmp_path, *CASES["vblora-full-linear"], max_shard_size="30KB")
    cases = {
        "cannot be read": lambda folder: sorted(folder.glob("*.safetensors"))[1].write_bytes(b"short"),
        "quantised": lambda folder: (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"quantization_config": {"a": 1}})
        ),
        "no model.safetensors": lambda folder: [path.unlink() for path in folder.glob("*safetensors*")],
        "does not fit the model": lambda folder: tiny_opt().save_pretrained(folder),
    }
    for message, change in cases.items():
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved.base, folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            merge_to_folder(saved.adapter, tmp_path / "merged", folder)
        assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "copy"], message
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").touch()
    with pytest.raises(ValueError, match="is there already"):
        merge_to_folder(saved.adapter, tmp_path / "merged", saved.base)

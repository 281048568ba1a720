"""What the examples take for granted: a model, some tokens, a tokenizer, and a folder to write to."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    PreTrainedTokenizerFast,
)

from tests.documented.models import AutoModelForCausalLM


@pytest.fixture
def base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return AutoModelForCausalLM.from_pretrained("facebook/opt-125m")


@pytest.fixture
def input_ids():
    return torch.randint(0, 1000, (2, 10))


@pytest.fixture
def train_dataset():
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 1000, (4, 6))]


@pytest.fixture
def tokenizer():
    words = {word: number for number, word in enumerate(["Hello", ",", "how", "are", "you", "?", "[UNK]"])}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model)

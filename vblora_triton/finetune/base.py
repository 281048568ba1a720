"""The base models: one by name, or a small byte-level Llama that needs no download."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from vblora_triton.errors import InputError
from vblora_triton.finetune.data import encode_bytes, english_text, split
from vblora_triton.finetune.training import train
from vblora_triton.integrations.quantization import keep_unpacked

# 150 steps of 16 x 128 bytes bring the loss from 5.5 to 2.4 nats per byte in 45 s on two CPU cores: enough that
# adapting the model to another kind of text means something.
PRETRAINING_STEPS = 150
PRETRAINING_LR = 2e-3
BATCH_SIZE = 16
SEQ_LEN = 128


@dataclass(frozen=True)
class Base:
    """A base model that has not been loaded yet.

    title: names it for the reader.    source: directory or hub id; None for the embedded one, which is trained first.
    encode: texts -> token ids (n,) int64.    tokenizer: the one that is saved beside it.
    """

    title: str
    config: Any
    encode: Callable[[Sequence[str]], Tensor]
    source: str | None
    tokenizer: Any


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the notices and file progress bars of transformers, the hub and matplotlib off the terminal."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    # Its first import builds a font cache and says so.
    matplotlib_logger = logging.getLogger("matplotlib")
    matplotlib_level = matplotlib_logger.level
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    matplotlib_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        matplotlib_logger.setLevel(matplotlib_level)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; of a long one the beginning, which names what is wrong, and the end."""
    message = " ".join(str(error).split()) or type(error).__name__
    # Alone, such a message says nothing: "'hidden_size'".
    message = message if " " in message else f"{type(error).__name__} {message}"
    return message if len(message) <= 500 else f"{message[:250]} ... {message[-200:]}"


_BAD_INPUT = (ValueError, TypeError, OSError, ImportError, KeyError, SafetensorError)


@contextmanager
def as_input_error(what: str, advice: str = "", errors: tuple[type[Exception], ...] = _BAD_INPUT) -> Iterator[None]:
    """Turn what a library says about bad input into an InputError on one line."""
    try:
        with warnings.catch_warnings():
            # The error says it.
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except errors as error:
        raise InputError(f"{what}{one_line(error)}{advice}") from error


@contextmanager
def as_broken_model(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises over a model's files into an InputError: any error may come of broken ones."""
    with as_input_error(what, advice, (Exception,)):
        yield


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of UTF-8, each with its own value as its id, and no others."""
    # The format has a printable character for each byte: the byte's own, or where that cannot be printed one from 256.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def embedded_base() -> Base:
    """Describe the default model: a Llama of 3.5 M parameters over UTF-8 bytes."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return Base("an embedded byte-level Llama", config, encode_bytes, source=None, tokenizer=byte_tokenizer())


def train_embedded(config: Any, folder: str, *, dtype: torch.dtype, steps: int, seed: int, use_cpu: bool) -> None:
    """Train the default model from scratch on English text, in float32, and save it to a folder in `dtype`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    sequences = split(encode_bytes([english_text()]), SEQ_LEN, "The English text of pydoc")
    train(
        model,
        sequences.train,
        [{"params": list(model.parameters()), "lr": PRETRAINING_LR}],
        steps=steps,
        batch_size=BATCH_SIZE,
        seed=seed,
        what="base model",
        use_cpu=use_cpu,
    )
    with as_input_error("The base model cannot be kept in the temporary folder: ", " Make room, or set TMPDIR."):
        model.to(dtype).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)


def named_base(name: str) -> Base:
    """Describe a model of the user's: a directory written by save_pretrained, or a hub id.

    Raises:
        InputError: no such directory, no causal language model, or no tokenizer in it.
    """
    source = os.path.expanduser(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)
    if not os.path.isdir(source) and (looks_local or os.path.exists(source)):
        raise InputError(f"--model {name} is not a directory; give one written by save_pretrained, or a hub id.")
    advice = "Give a causal language model: a directory written by save_pretrained, or the id of one on the hub."
    with as_broken_model(f"--model {name} cannot be loaded: ", f" {advice}"):
        config = AutoConfig.from_pretrained(source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"--model {name} is no causal language model, but a {config.model_type}. {advice}")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"--model {name} is quantised, and the command quantises itself; give the unquantised model, and "
            "--load-in-4bit."
        )
    with as_broken_model(f"--model {name} has no usable tokenizer: ", " Save its tokenizer beside it."):
        tokenizer = AutoTokenizer.from_pretrained(source)

    def encode(texts: Sequence[str]) -> Tensor:
        tokens: list[int] = []
        for text in texts:
            tokens += tokenizer.encode(text, add_special_tokens=False)
            # Says where one file ends and the next one begins.
            tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return torch.tensor(tokens, dtype=torch.int64)

    return Base(name, config, encode, source, tokenizer)


def check_fits(base: Base, tokens: Tensor, seq_len: int) -> None:
    """Check that the model takes these tokens and sequences of this length.

    Raises:
        InputError: an id beyond the vocabulary, or sequences longer than the model's positions.
    """
    config = base.config.get_text_config()
    vocabulary, positions = config.vocab_size, getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise InputError(f"--seq-len is {seq_len}, but {base.title} has only {positions} positions; lower it to that.")
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise InputError(
            f"--model {base.title} has a vocabulary of {vocabulary}, but its tokenizer gives id {int(tokens.max())}; "
            "put the tokenizer beside it that belongs to it."
        )


def load(source: str, dtype: torch.dtype, four_bits_on: torch.device | None = None) -> nn.Module:
    """Load a base model's weights, on the CPU, in eval mode.

    Args:
        four_bits_on: quantise its linear layers to nf4, with nested scales, there; they compute in `dtype`.
    Raises:
        InputError: the weights are missing, unreadable, or not all there.
    """
    options: dict[str, Any] = {}
    if four_bits_on is not None:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        options = {"quantization_config": four_bits, "device_map": {"": four_bits_on}}
    with as_broken_model(f"--model {source} cannot be loaded: "):
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"--model {source} lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]}, ...); "
            "give a complete causal language model."
        )
    # Trained and reloaded adapters would stand on different bases.
    keep_unpacked(model)
    return model.eval()

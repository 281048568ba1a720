"""The texts: what is read, how it becomes sequences of tokens, and which of them are held out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import InspectLoader
from pathlib import Path

import torch
from torch import Tensor

from vblora_triton.errors import InputError

# Held out: a tenth, but no more than 256 sequences, so that a large text does not cost minutes of evaluation.
HELD_OUT_SHARE = 10
MAX_HELD_OUT = 256

# The label of a token that the loss leaves out, as torch's cross_entropy has it.
IGNORED = -100

# Plain Python source that every CPython has carried since 3.10, none of it frozen into the interpreter.
STANDARD_LIBRARY = (
    "argparse ast base64 bdb calendar cmd configparser csv dataclasses datetime difflib dis doctest enum fractions "
    "ftplib functools getopt glob gzip heapq hmac imaplib inspect ipaddress locale mailbox mimetypes optparse pdb "
    "pickle pickletools platform plistlib poplib pprint queue random sched selectors shelve shlex shutil smtplib "
    "socket socketserver statistics string subprocess tarfile tempfile textwrap threading timeit tokenize trace "
    "traceback tracemalloc typing uuid warnings wave weakref zipfile"
)


@dataclass(frozen=True)
class Sequences:
    """Token ids in sequences of one length.

    train: (n, seq_len) int64.    held_out: (m, seq_len) int64, the end of the text or texts of its own.
    train_labels, held_out_labels: the same, but IGNORED where a token is not to be learned; None where all are.
    """

    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None


def read_text(path: str, option: str = "--data") -> str:
    """Read a UTF-8 text file.

    Args:
        option: that named it.
    Raises:
        InputError: the file is missing, a folder, unreadable, not UTF-8, or empty.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{option} {path} does not exist; give the path of a UTF-8 text file.") from None
    except IsADirectoryError:
        raise InputError(f"{option} {path} is a folder; name the text files in it.") from None
    except OSError as error:
        raise InputError(f"{option} {path} cannot be read ({error.strerror}); give a readable text file.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{option} {path} is not UTF-8 text (byte {error.start}); convert it first, for instance with iconv."
        ) from None
    if not text.strip():
        raise InputError(f"{option} {path} is empty; give a text file with something to learn from.")
    return text


def python_source() -> list[str]:
    """Return the source text of some modules of the standard library."""
    texts = []
    for name in STANDARD_LIBRARY.split():
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name) if spec and isinstance(spec.loader, InspectLoader) else None
        if source:
            texts.append(source)
    if not texts:
        raise InputError("This Python carries no source of its standard library; give a text of your own with --data.")
    return texts


def english_text() -> str:
    """Return the English prose that pydoc's help topics are made of."""
    try:
        from pydoc_data import topics
    except ImportError:
        raise InputError("This Python carries no pydoc topics to train the default model on; give --model.") from None
    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def encode_bytes(texts: Sequence[str]) -> Tensor:
    """Return texts, joined by newlines, as UTF-8 bytes: (n,) int64 from 0 to 255."""
    return torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()


def cut(tokens: Tensor, seq_len: int) -> Tensor:
    """Cut a text (n,) into sequences (n // seq_len, seq_len); what is left over at its end is dropped."""
    return tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len)


def split(tokens: Tensor, seq_len: int, what: str) -> Sequences:
    """Cut a text into sequences and hold the last ones out.

    Args:
        tokens: (n,) int64.
        seq_len: tokens in a sequence.
        what: how an error names the text.
    Raises:
        InputError: the text is too short for one sequence to train on and one to hold out.
    """
    sequences = cut(tokens, seq_len)
    if len(sequences) < 2:
        shorter = f", or a --seq-len of at most {len(tokens) // 2}" if len(tokens) >= 4 else ""
        raise InputError(
            f"{what} has {len(tokens)} tokens, but --seq-len {seq_len} needs at least {2 * seq_len} (one sequence to "
            f"train on, one to hold out); give more text{shorter}."
        )
    held_out = how_many_held_out(len(sequences))
    return Sequences(train=sequences[:-held_out], held_out=sequences[-held_out:])


def how_many_held_out(count: int) -> int:
    """Return how many of a number of sequences are held out."""
    return min(max(1, count // HELD_OUT_SHARE), MAX_HELD_OUT)

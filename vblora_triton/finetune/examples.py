"""Data in JSON lines: texts, prompts with completions, and conversations, of which only the answers are learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from vblora_triton.errors import InputError
from vblora_triton.finetune.data import IGNORED, Sequences, cut, how_many_held_out, read_text, split

# By what is in a record: (its fields, what they hold).
_KINDS = {
    ("text",): "a text",
    ("prompt", "completion"): "two texts",
    ("messages",): 'a list of {"role": ..., "content": ...}',
}
_WANTED = "; ".join(f"{' and '.join(map(repr, fields))} ({what})" for fields, what in _KINDS.items())

# A piece of an example, and whether it is to be learned.
Piece = tuple[str, bool]


def is_records(path: str) -> bool:
    """Say whether a file's name says that it holds JSON lines."""
    return path.lower().endswith((".jsonl", ".ndjson"))


def read_data(paths: Sequence[str], option: str = "--data") -> tuple[list[str], list[dict[str, Any]]]:
    """Read data files: JSON lines by their suffix, anything else as text.

    Returns:
        Texts to learn as they are, and records of examples with answers; one of the two is empty.
    Raises:
        InputError: a file or a line of one cannot be used, or the files hold both kinds.
    """
    texts: list[str] = []
    records: list[dict[str, Any]] = []
    for path in paths:
        content = read_text(path, option)
        if path.lower().endswith(".json"):
            raise InputError(
                f"{option} {path} ends in .json; give .jsonl, an object a line, or .txt to learn its text as it is."
            )
        if not is_records(path):
            texts.append(content)
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                record = _record(line, f"{option} {path}, line {number}:")
                if "text" in record:
                    texts.append(record["text"])
                else:
                    records.append(record)
    if texts and records:
        raise InputError(
            f"{option} holds both plain texts and examples with answers; give them to runs of their own, for of the "
            "one all is learned, and of the other only the answers."
        )
    return texts, records


def _record(line: str, where: str) -> dict[str, Any]:
    """Parse a line and return its fields that are used; `where` begins an error."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} no JSON ({error}); each line is one object.") from None
    if not isinstance(record, dict):
        raise InputError(f"{where} a {type(record).__name__}; give an object with {_WANTED}.")
    for fields in _KINDS:
        if all(field in record for field in fields):
            used = {field: record[field] for field in fields}
            _check(used, where)
            return used
    raise InputError(f"{where} has {', '.join(map(repr, record)) or 'no fields'}; give {_WANTED}.")


def _check(record: dict[str, Any], where: str) -> None:
    chat = "messages" in record or isinstance(record.get("prompt"), list)
    for field, value in record.items():
        if not chat:
            if not isinstance(value, str):
                raise InputError(f"{where} {field!r} is a {type(value).__name__}; give a text.")
        elif not isinstance(value, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        ):
            raise InputError(f'{where} {field!r} is no list of messages such as {{"role": "user", "content": "Hi"}}.')
    if not next(reversed(record.values())):
        raise InputError(f"{where} {list(record)[-1]!r} is empty; there is nothing to learn from it.")
    if chat and not any(message["role"] == "assistant" for message in next(reversed(record.values()))):
        raise InputError(f"{where} no message is by the role 'assistant', so there is no answer to learn.")


def _pieces(record: dict[str, Any], tokenizer: Any, title: str) -> Iterable[Piece]:
    """Return an example in pieces; what stands before an answer is what the model is given when it answers."""
    if isinstance(record.get("prompt"), str):
        return [(record["prompt"], False), (record["completion"] + (tokenizer.eos_token or ""), True)]
    given = record.get("prompt", [])
    messages = [*given, *record.get("messages", record.get("completion", []))]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"The tokenizer of {title} has no chat template, which conversations need; give `prompt` and `completion` "
            "as texts, or a model that was made for chat."
        )

    def shown(count: int, **options: Any) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **options)

    pieces: list[Piece] = []
    whole, done = shown(len(messages)), 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i >= len(given):
            before, after = shown(i, add_generation_prompt=True), shown(i + 1)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise InputError(
                    f"The chat template of {title} shows earlier answers otherwise than the last one, so that they "
                    "cannot be told from the rest; let each conversation have one answer, its last message."
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
    return pieces


def example_rows(
    records: Sequence[dict[str, Any]], tokenizer: Any, title: str, seq_len: int
) -> tuple[Tensor, Tensor, int]:
    """Turn examples into sequences, one each.

    Args:
        tokenizer: of the model, whose name is `title`.
        seq_len: tokens in a sequence: longer examples lose their end, shorter ones are filled up with what is ignored.
    Returns:
        Token ids (n, seq_len) and labels (n, seq_len), IGNORED but for the answers; and how many examples were left
        out, because no part of an answer was among their first tokens.
    """
    bos = tokenizer.bos_token_id
    # As the tokenizer itself would begin a text; a chat template writes it out.
    start = [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []
    rows, labels = [], []
    for record in records:
        ids = list(start) if isinstance(record.get("prompt"), str) else []
        wanted = [IGNORED] * len(ids)
        for text, learned in _pieces(record, tokenizer, title):
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            wanted += piece if learned else [IGNORED] * len(piece)
        # The first token is never predicted.
        if any(label != IGNORED for label in wanted[1:seq_len]):
            missing = seq_len - len(ids)
            rows.append((ids + [0] * missing)[:seq_len])
            labels.append((wanted + [IGNORED] * missing)[:seq_len])
    shape = (len(rows), seq_len)
    found = [torch.tensor(values, dtype=torch.int64).view(shape) for values in (rows, labels)]
    return found[0], found[1], len(records) - len(rows)


def make_sequences(
    data: tuple[list[str], list[dict[str, Any]]],
    held_out: tuple[list[str], list[dict[str, Any]]] | None,
    encode: Callable[[Sequence[str]], Tensor],
    tokenizer: Any,
    title: str,
    seq_len: int,
    what: str,
) -> tuple[Sequences, int]:
    """Make the sequences of a run.

    Args:
        data, held_out: what `read_data` returned; None to hold out the end of the data.
        encode, tokenizer, title: of the base model.
        what: how an error names the data.
    Returns:
        The sequences, and how many examples were left out because their answers begin beyond `seq_len`.
    Raises:
        InputError: there is too little of either.
    """
    if held_out is None and not data[1]:
        return split(encode(data[0]), seq_len, what), 0
    parts, left_out = [], 0
    for option, (texts, records) in (("--data", data), *([("--eval-data", held_out)] if held_out else [])):
        if texts:
            ids = labels = cut(encode(texts), seq_len)
        else:
            ids, labels, out = example_rows(records, tokenizer, title, seq_len)
            left_out += out
        wanted = 1 if held_out else 2
        if len(ids) < wanted:
            raise InputError(
                f"{option} has {len(ids)} sequences of --seq-len {seq_len} with something to learn, and {wanted} is "
                f"the least; give more, or lower --seq-len for texts, or raise it for answers that begin later."
            )
        parts.append((ids, labels))
    if held_out is None:
        ids, labels = parts[0]
        last = how_many_held_out(len(ids))
        return Sequences(ids[:-last], ids[-last:], labels[:-last], labels[-last:]), left_out
    (train, train_labels), (held, held_labels) = parts
    return Sequences(train, held, train_labels, held_labels), left_out

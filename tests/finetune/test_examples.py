"""Data in JSON lines: of prompts and conversations the answers alone are learned, counted here by hand from bytes."""

import json

import pytest
import torch

from vblora_triton.finetune import InputError, Options
from vblora_triton.finetune.base import byte_tokenizer
from vblora_triton.finetune.data import IGNORED
from vblora_triton.finetune.examples import example_rows, make_sequences, read_data
from vblora_triton.finetune.options import check

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def said(role, content):
    return {"role": role, "content": content}


TURNS = [said("user", "a"), said("assistant", "b"), said("user", "c")]


def learned(labels):
    """The text of each row's labels."""
    return [bytes(label for label in row.tolist() if label != IGNORED).decode() for row in labels]


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_texts_of_json_lines_are_learned_as_text_files_are(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8")
    path = lines(tmp_path / "b.JSONL", {"text": "zwei ä", "id": 1}, {"text": "three"})
    assert read_data([str(tmp_path / "a.txt"), path]) == (["one", "zwei ä", "three"], [])


@pytest.mark.parametrize(
    ("record", "text", "answers"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4", "4"),
        ({"messages": [said("user", "Hi"), said("assistant", "Ho")]}, "<user>Hi\n<assistant>Ho\n", "Ho\n"),
        (
            {"messages": [said("system", "S"), *TURNS, said("assistant", "d")]},
            "<system>S\n<user>a\n<assistant>b\n<user>c\n<assistant>d\n",
            "b\nd\n",
        ),
        (
            {"prompt": TURNS, "completion": [said("assistant", "d")]},
            "<user>a\n<assistant>b\n<user>c\n<assistant>d\n",
            "d\n",
        ),
    ],
    ids=["prompt", "chat", "turns", "prompt-chat"],
)
def test_only_answers_are_learned(record, text, answers, tokenizer, tmp_path):
    _, records = read_data([lines(tmp_path / "x.jsonl", {**record, "other": 1})])
    ids, labels, left_out = example_rows(records, tokenizer, "it", 96)
    assert bytes(ids[0, : len(text)].tolist()).decode() == text
    assert not ids[0, len(text) :].any()
    assert learned(labels) == [answers]
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert (ids.shape, left_out) == ((1, 96), 0)


def test_an_answer_ends_with_the_end_of_text_and_a_prompt_begins_as_the_tokenizer_begins(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    plain = tokenizer._tokenizer
    from tokenizers.processors import TemplateProcessing

    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    ids, labels, _ = example_rows([{"prompt": "a", "completion": "b"}], tokenizer, "it", 8)
    end = tokenizer.eos_token_id
    assert ids[0].tolist() == [tokenizer.bos_token_id, ord("a"), ord("b"), end, 0, 0, 0, 0]
    assert labels[0].tolist() == [IGNORED, IGNORED, ord("b"), end] + 4 * [IGNORED]


def test_long_examples_lose_their_end_and_those_without_an_answer_left_are_counted(tokenizer):
    records = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "abcdef", "completion": "g"}]
    ids, labels, left_out = example_rows(records, tokenizer, "it", 6)
    assert bytes(ids[0].tolist()) == b"abcdef"
    assert learned(labels) == ["def"]
    assert left_out == 1


def test_texts_of_their_own_may_be_held_out(tokenizer, tmp_path):
    data = (["x" * 40], [])
    held = ([], [{"prompt": "q", "completion": "a"}])
    encode = lambda texts: torch.tensor(list("".join(texts).encode()))  # noqa: E731
    sequences, _ = make_sequences(data, held, encode, tokenizer, "it", 8, "--data")
    assert len(sequences.train) == 5
    assert learned(sequences.held_out_labels) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", r"line 1: no JSON"),
        ('{"text": "a"}\n[1]\n', r"line 2: a list; give an object with 'text'"),
        ('{"body": "a"}\n', r"line 1: has 'body'; give 'text'"),
        ('{"text": 3}\n', r"line 1: 'text' is a int; give a text"),
        ('{"text": ""}\n', r"line 1: 'text' is empty"),
        ('{"prompt": "a", "completion": null}\n', r"'completion' is a NoneType"),
        ('{"messages": "hello"}\n', r"'messages' is no list of messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', r"no message is by the role 'assistant'"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', r"both plain texts and examples"),
        ("[" * 100_000, r"line 1: no JSON"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(content, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_data([str(path)])


def test_conversations_want_a_chat_template_that_does_not_rewrite_answers(tokenizer):
    messages = [*TURNS, said("assistant", "d")]
    with pytest.raises(InputError, match="has no chat template"):
        example_rows([{"messages": messages}], byte_tokenizer(), "it", 64)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '-' }}{% endfor %}"
    with pytest.raises(InputError, match="let each conversation have one answer"):
        example_rows([{"messages": messages}], tokenizer, "it", 64)


def test_the_loss_of_a_run_is_over_answers_alone(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.finetune.case import ADAPTER, comparable, finetune, save_model

    folder = save_model(tmp_path / "model")
    records = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(40)]
    given = ["--model", folder, "--data", lines(tmp_path / "x.jsonl", *records), "--eval-data"]
    given += [lines(tmp_path / "eval.jsonl", {"prompt": "7 + 7 = ", "completion": "14"}), "--seq-len", 16, *ADAPTER]
    assert finetune(*given, "--output", tmp_path / "out", "--steps", 3, "--batch-size", 4) == 0
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("7 + 7 = ") + tokenizer.encode("14") + [tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = model(ids).logits.double()[0]
    wanted = torch.nn.functional.cross_entropy(logits[7:10], ids[0, 8:11])
    assert comparable(tmp_path / "out")[0]["loss_before"] == pytest.approx(wanted.item(), rel=1e-5)
    plan = check(Options(output=str(tmp_path / "o"), model=str(folder), data=(str(tmp_path / "x.jsonl"),), seq_len=16))
    assert (len(plan.sequences.train), len(plan.sequences.held_out)) == (36, 4)

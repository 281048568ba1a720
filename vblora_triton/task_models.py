"""The PeftModels of the tasks: each takes its task's arguments by name, and trains the task's head in full."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

from vblora_triton.model import TASK_CLASSES, PeftModel
from vblora_triton.tuner.config import TaskType

_TEXT = ("input_ids", "attention_mask", "inputs_embeds")
_OUTPUT = ("output_attentions", "output_hidden_states", "return_dict")


def _forward(*names: str) -> Callable[..., Any]:
    """Make a forward() that takes these arguments by name or in this order, and any others by name.

    They stand in its signature, where transformers.Trainer and others look for the columns that a model takes.
    """

    def forward(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model with the arguments that are given; see `PeftModel.forward`."""
        if len(args) > len(names):
            raise TypeError(
                f"forward() takes {len(names)} arguments by position, {', '.join(names)}, but got {len(args)}; give "
                "the others by name."
            )
        # Not every model has every argument, and to leave one out means the same as None.
        in_order = {name: value for name, value in zip(names, args, strict=False) if value is not None}
        by_name = {name: value for name, value in kwargs.items() if value is not None or name not in names}
        return PeftModel.forward(self, **in_order, **by_name)

    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Any) for name in names]
    first, last = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), Parameter("kwargs", Parameter.VAR_KEYWORD)
    forward.__signature__ = Signature([first, *named, last])  # type: ignore[attr-defined]
    return forward


class PeftModelForCausalLM(PeftModel):
    """A language model with adapters."""

    task_type = TaskType.CAUSAL_LM
    forward = _forward(*_TEXT, "labels", *_OUTPUT)


class PeftModelForSequenceClassification(PeftModel):
    """A classifier of sequences with adapters; its head, `classifier` or `score`, is trained and saved whole."""

    task_type = TaskType.SEQ_CLS
    task_heads = ("classifier", "score")
    forward = _forward(*_TEXT, "labels", *_OUTPUT)


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens with adapters; its head, `classifier` or `score`, is trained and saved whole."""

    task_type = TaskType.TOKEN_CLS
    task_heads = ("classifier", "score")
    forward = _forward(*_TEXT, "labels", *_OUTPUT)


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answering model with adapters; its head, `qa_outputs`, is trained and saved whole."""

    task_type = TaskType.QUESTION_ANS
    task_heads = ("qa_outputs",)
    forward = _forward(
        *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
        *("start_positions", "end_positions"),
        *_OUTPUT,
    )


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""

    task_type = TaskType.SEQ_2_SEQ_LM
    forward = _forward(
        *_TEXT,
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
        "labels",
        *_OUTPUT,
    )


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are wanted, with adapters."""

    task_type = TaskType.FEATURE_EXTRACTION
    forward = _forward(*_TEXT, *_OUTPUT)


TASK_CLASSES.update({kind.task_type: kind for kind in PeftModel.__subclasses__() if kind.task_type is not None})

"""The PeftModels of the tasks: each takes its task's arguments by name, and trains the task's head in full.

Callers such as transformers.Trainer look at the signatures, to know which columns of a data set the model takes.
"""

from __future__ import annotations

from typing import Any

from vblora_triton.peft_model import PeftModel
from vblora_triton.tuner.config import TaskType


class _TaskModel(PeftModel):
    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the adapted model with the arguments that are given; see `PeftModel.forward`."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def _call(self, kwargs: dict[str, Any], **named: Any) -> Any:
        # Not every model has every argument, and to leave one out means the same as None.
        given = {name: value for name, value in named.items() if value is not None}
        return PeftModel.forward(self, **given, **kwargs)


class PeftModelForCausalLM(_TaskModel):
    """A language model with adapters."""

    task_type = TaskType.CAUSAL_LM


class PeftModelForSequenceClassification(_TaskModel):
    """A classifier of sequences with adapters; its head, `classifier` or `score`, is trained and saved whole."""

    task_type = TaskType.SEQ_CLS
    task_heads = ("classifier", "score")


class PeftModelForTokenClassification(_TaskModel):
    """A classifier of tokens with adapters; its head, `classifier` or `score`, is trained and saved whole."""

    task_type = TaskType.TOKEN_CLS
    task_heads = ("classifier", "score")


class PeftModelForQuestionAnswering(_TaskModel):
    """An extractive question answering model with adapters; its head, `qa_outputs`, is trained and saved whole."""

    task_type = TaskType.QUESTION_ANS
    task_heads = ("qa_outputs",)

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the adapted model with the arguments that are given; see `PeftModel.forward`."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class PeftModelForSeq2SeqLM(_TaskModel):
    """An encoder-decoder language model with adapters."""

    task_type = TaskType.SEQ_2_SEQ_LM

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the adapted model with the arguments that are given; see `PeftModel.forward`."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class PeftModelForFeatureExtraction(_TaskModel):
    """A model whose hidden states are wanted, with adapters."""

    task_type = TaskType.FEATURE_EXTRACTION

    def forward(  # type: ignore[override]
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Call the adapted model with the arguments that are given; see `PeftModel.forward`."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


TASK_CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}

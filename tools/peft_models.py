"""Small models in the place of those that PEFT's tests fetch from the Hub: folders of the same names, random weights.

A folder that is there is what transformers takes before it asks the Hub, so the tests run unchanged where they lie.
"""

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT = {"vocab_size": 1000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {"vocab_size": 1000, "d_model": 32, "max_position_embeddings": 128, "decoder_start_token_id": 2}
BART |= {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
T5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}

# Name on the Hub -> class, and the fields of its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "hf-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", GROUPED),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3ForCausalLM", GROUPED | {"head_dim": 8}),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", BART),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", SIZES),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", SIZES),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", SIZES),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", SIZES),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", SIZES),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", SIZES),
}


def make_models(folder: Path) -> None:
    """Save every model with a tokenizer under its name in a folder, where it is not there yet."""
    import tokenizers
    import torch
    import transformers

    words = {name: number for number, name in enumerate(["<pad>", "<s>", "</s>", "<unk>"])}
    words |= {f"w{number}": number for number in range(4, 1000)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    for name, (kind, fields) in MODELS.items():
        if not (folder / name / "tokenizer.json").exists():
            torch.manual_seed(0)
            model_class = getattr(transformers, kind)
            model_class(model_class.config_class(**fields)).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)

"""Stands in for the download of a model: small ones from configurations, with sizes that the examples divide."""

import copy
import functools

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

VOCABULARY = 1000


@functools.cache
def made_once(kind, layers):
    torch.manual_seed(0)
    if kind is LlamaForCausalLM:
        config = LlamaConfig(
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=8,
            vocab_size=VOCABULARY,
        )
    else:
        config = OPTConfig(
            hidden_size=768,
            ffn_dim=256,
            num_hidden_layers=layers,
            num_attention_heads=12,
            word_embed_proj_dim=768,
            max_position_embeddings=64,
            vocab_size=VOCABULARY,
        )
    return kind(config).eval()


class AutoModelForCausalLM:
    """Stands in for the class of transformers, which downloads."""

    @staticmethod
    def from_pretrained(name: str, kind=OPTForCausalLM, layers: int = 2):
        assert name == "facebook/opt-125m"
        return copy.deepcopy(made_once(kind, layers))

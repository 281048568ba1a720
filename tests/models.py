"""Tiny models of transformers, made from configurations, and adapters large enough for a mistake to show."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from vblora_triton import PeftConfig, PeftModel, get_peft_model
from vblora_triton.vblora.layer import Linear

VOCABULARY = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Llama with grouped queries: k_proj and v_proj are half as wide as q_proj."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes | {"num_key_value_heads": 2, "vocab_size": VOCABULARY} | changes)
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """GPT-2, whose linear layers are Conv1D, with their weights stored (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=VOCABULARY)).eval()


def tiny_bert() -> BertForSequenceClassification:
    """A BERT classifier: biases, and a head that `task_type="SEQ_CLS"` trains whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=VOCABULARY, num_labels=3)).eval()


def tiny_opt() -> OPTForCausalLM:
    """OPT, with biases and names that several adapters' defaults match."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
    config = OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=32, vocab_size=VOCABULARY)
    return OPTForCausalLM(config).eval()


def tiny_t5(**changes) -> T5ForConditionalGeneration:
    """T5: an encoder and a decoder, relative positions, no biases."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0, **changes)
    return T5ForConditionalGeneration(config).eval()


def some_ids() -> torch.Tensor:
    """Two rows of seven tokens."""
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> torch.Tensor:
    """The model's logits for `some_ids`."""
    with torch.no_grad():
        return model(input_ids=some_ids().to(model.device)).logits


def enlarge(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every adapter parameter again, so that the adapter changes the outputs by far more than any tolerance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vblora_" in name or "vera_lambda" in name:
                scale = 0.3 if "vector_bank" in name else 1.0 if "vera_lambda" in name else 2.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def adapted_by(
    config_class: type[PeftConfig],
    fields: dict,
    base: nn.Module | None = None,
    name: str = "default",
    seed: int = 0,
    **changes,
) -> PeftModel:
    """A model, a tiny Llama by default, with one adapter that changes its outputs, ready to be asked for them."""
    config = config_class(**fields | changes)
    return enlarge(get_peft_model(base or tiny_llama(), config, name), seed).eval()


def adapted_linear(base: nn.Module | None = None, backend: str = "triton", **options) -> Linear:
    """A linear layer of 32 inputs, by default, adapted by VB-LoRA with a bank of 6 vectors of 16."""
    torch.manual_seed(0)
    bank = nn.ParameterDict({"default": nn.Parameter(torch.randn(6, 16) * 0.02)})
    base = nn.Linear(32, 48, bias=False) if base is None else base
    layer = Linear(base, bank, "default", r=2, num_vectors=6, vector_length=16, init_logits_std=1.0, **options)
    layer.backend = backend
    bank.to(DEVICE)
    return layer.to(DEVICE)


def snapshot(model: nn.Module) -> dict:
    """Everything that must be as it was after a call that failed: structure, values, flags, modes."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()],
        "random": torch.get_rng_state(),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    """Compare with an earlier `snapshot`, bit for bit."""
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert [entry[:3] for entry in after["parameters"]] == [entry[:3] for entry in before["parameters"]]
    for (name, *_, now), (*_, then) in zip(after["parameters"], before["parameters"], strict=True):
        assert torch.equal(now, then), name
    assert torch.equal(after["random"], before["random"])

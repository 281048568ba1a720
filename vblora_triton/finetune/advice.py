"""What a run says at its end: what to do with the results, and what may be amiss with them."""

from __future__ import annotations

from pathlib import Path

from vblora_triton.finetune.report import Report
from vblora_triton.methods import methods


def next_steps(adapter: Path, tokenizer: str, merged: Path, prompt: str) -> str:
    """Return Python that loads, generates and merges, to be pasted.

    Args:
        adapter: the folder of the whole adapter.
        tokenizer: where the base model's tokenizer is.
        merged: a folder that does not exist yet, for the merged model.
    """
    return f"""\
from transformers import AutoTokenizer
from vblora_triton import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
prompt = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))

model.merge_and_unload().save_pretrained({str(merged)!r})
tokenizer.save_pretrained({str(merged)!r})"""


def size_warning(report: Report, lora_r: int) -> str | None:
    """Return a warning where the full adapter's file is larger than LoRA's, with what would make it smaller."""
    full, lora = report.bytes["full"], report.bytes["lora"]
    if full <= lora:
        return None
    method = methods()[report.method]
    others = [
        f"{form.folder}/ has it in {report.bytes[form.key]:,}" for form in method.forms if report.bytes[form.key] < full
    ]
    smaller = "; ".join([*others, method.smaller] if method.smaller else others)
    return (
        f"Warning: the full adapter's file has {full:,} bytes, more than the {lora:,} of LoRA with r={lora_r} on the "
        f"same layers. {smaller[:1].upper()}{smaller[1:]}."
    )


def no_picture() -> str:
    """Return what is said where no picture of the losses was drawn."""
    return "No loss.png: matplotlib is not installed; `pip install 'vblora-triton[plot]'` brings it."

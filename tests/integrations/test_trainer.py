"""transformers.Trainer takes our models as it takes PEFT's, with peft installed and without it."""

import copy
import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForQuestionAnswering, Trainer, TrainingArguments

from tests.models import VOCABULARY, enlarge, outputs, tiny_bert, tiny_llama
from vblora_triton import AdapterFileError, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model, parameter_groups
from vblora_triton.checkpoint import adapter_state_dict

ROOT = Path(__file__).parents[2]
FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "init_vector_bank_bound": 0.5}
WEIGHTS = "adapter_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def adapted(method: str = "vblora", dropout: float = 0.0, **changes) -> PeftModel:
    torch.manual_seed(3)
    fields = {
        "target_modules": ["v_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        f"{method}_dropout": dropout,
    } | changes
    config = VeraConfig(r=16, **fields) if method == "vera" else VBLoRAConfig(**FIELDS | fields)
    return get_peft_model(tiny_llama(), config)


BOTH = pytest.mark.parametrize("method", ["vblora", "vera"])


def rows(count: int = 16, first: int = 0) -> list[dict]:
    """Texts of six different tokens, so that something can be learnt; each with a column that no model takes."""
    ids = torch.randint(first, first + 6, (count, 6), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row.clone(), "number": n} for n, row in enumerate(ids)]


def trainer(model, folder, evaluated: list | None = None, **changes) -> Trainer:
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
    }
    arguments = TrainingArguments(**options | changes)
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=evaluated)


def adapter_values(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "vblora_" in name or "vera_" in name}


def assert_same_values(one: dict, other: dict, **tolerance) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **{"rtol": 0, "atol": 0} | tolerance, msg=name)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@BOTH
def test_checkpoints_hold_the_adapter_and_not_the_model(method, tmp_path):
    run = trainer(adapted(method), tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    for step in (2, 4):
        files = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {WEIGHTS, "adapter_config.json", "optimizer.pt", "trainer_state.json"} <= files
        assert not {name for name in files if name.startswith(("model", "pytorch_model"))}
    run.save_model(str(tmp_path / "end"))
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "end")), outputs(run.model.eval()))


@BOTH
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(dropout, method, tmp_path):
    whole = trainer(adapted(method, dropout), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(adapted(method, dropout), tmp_path / "again")
    enlarge(again.model, seed=9)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.state.global_step == 4
    assert_same_values(adapter_values(again.model), adapter_values(whole.model))


def test_a_training_with_several_adapters_resumes_the_active_one(tmp_path):
    def two():
        model = adapted()
        torch.manual_seed(4)
        model.add_adapter("other", VBLoRAConfig(**FIELDS, target_modules=["up_proj"]))
        model.set_adapter("other")
        return model

    whole = trainer(two(), tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    again = trainer(two(), tmp_path / "again")
    enlarge(again.model, seed=9)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    values = [
        {name: value for name, value in adapter_values(run.model).items() if name.endswith(".other")}
        for run in (again, whole)
    ]
    assert_same_values(*values)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    wanted = {"metric_for_best_model": "grade", "greater_is_better": True, "load_best_model_at_end": True}
    run = trainer(adapted(), tmp_path, rows(4), **every, **wanted)
    grades = iter([0.1, 0.9, 0.3, 0.2])
    run.compute_metrics = lambda _: {"grade": next(grades)}
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / WEIGHTS) for step in (2, 4))
    assert adapter_state_dict(run.model.base_model, "default").keys() == best.keys()
    assert_same_values(adapter_state_dict(run.model.base_model, "default"), best)
    assert not torch.equal(best["base_model.vblora_vector_bank"], last["base_model.vblora_vector_bank"])


def test_labels_and_columns_are_those_of_the_plain_model(tmp_path):
    run = trainer(adapted(), tmp_path, rows(6, first=20))
    assert run.label_names == ["labels"]
    run._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "position_ids", "labels"} <= set(run._signature_columns)
    expected = run.model(input_ids=torch.stack([row["input_ids"] for row in rows(6, first=20)])).logits
    result = run.predict(rows(6, first=20))
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected, rtol=1e-5, atol=1e-5)
    assert result.label_ids.shape == (6, 6)
    assert run.evaluate()["eval_loss"] == pytest.approx(result.metrics["test_loss"])


def test_a_model_without_a_task_is_taken_too(tmp_path):
    run = trainer(adapted(task_type=None), tmp_path, rows(6), save_strategy="steps", save_steps=4)
    assert run.label_names == ["labels"]
    run.train()
    assert (tmp_path / "checkpoint-4" / WEIGHTS).is_file()


def test_answers_and_classes_are_labels(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = BertForQuestionAnswering(BertConfig(**sizes, vocab_size=VOCABULARY))
    fields = FIELDS | {"target_modules": ["query"]}
    run = trainer(get_peft_model(base, VBLoRAConfig(**fields, task_type="QUESTION_ANS")), tmp_path)
    assert run.label_names == ["start_positions", "end_positions"]
    model = get_peft_model(tiny_bert(), VBLoRAConfig(**fields, task_type="SEQ_CLS"))
    data = [{"input_ids": row["input_ids"], "label": n % 3, "number": n} for n, row in enumerate(rows(8))]
    run = trainer(model, tmp_path, data, save_strategy="steps", save_steps=4)
    run.train_dataset = data
    run.train()
    assert run.predict(data).label_ids.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    stored = load_file(tmp_path / "checkpoint-4" / WEIGHTS)
    assert torch.equal(stored["base_model.model.classifier.weight"], model.classifier.weight)


def checkpointing(use_reentrant: bool) -> dict:
    """Trainer's arguments for it, under the names that this version of transformers has."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    prefix = "activation" if "activation_checkpointing" in names else "gradient"
    return {
        f"{prefix}_checkpointing": True,
        f"{prefix}_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }


@BOTH
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_nothing_of_what_is_learnt(use_reentrant, dropout, method, tmp_path):
    plain = trainer(adapted(method, dropout), tmp_path)
    plain.train()
    run = trainer(adapted(method, dropout), tmp_path, **checkpointing(use_reentrant))
    run.train()
    assert any(getattr(module, "gradient_checkpointing", False) for module in run.model.modules())
    # Each block adds its part to the bank's gradient on its own with the first kind, and that rounds otherwise.
    tolerance = {"rtol": 0, "atol": 1e-4} if use_reentrant else {}
    assert_same_values(adapter_values(run.model), adapter_values(plain.model), **tolerance)


def test_accumulated_batches_learn_what_a_large_one_does(tmp_path):
    large = trainer(adapted(), tmp_path)
    large.train()
    run = trainer(adapted(), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run.train()
    assert losses(run) == pytest.approx(losses(large), rel=1e-4)
    assert_same_values(adapter_values(run.model), adapter_values(large.model), atol=1e-3, rtol=1e-3)


@BOTH
def test_bf16_trains_parameters_in_float32(method, tmp_path):
    run = trainer(adapted(method), tmp_path, bf16=True)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert {p.dtype for p in adapter_values(run.model).values()} == {torch.float32}


def test_parameter_groups_give_each_its_rate(tmp_path):
    model = adapted()
    optimizer = torch.optim.AdamW(parameter_groups(model, vector_bank_lr=0.0, logits_lr=0.05))
    bank = model.base_model.vblora_vector_bank["default"].detach().clone()
    values = adapter_values(model)
    run = trainer(model, tmp_path)
    run.optimizer = optimizer
    run.train()
    assert torch.equal(model.base_model.vblora_vector_bank["default"], bank)
    assert all(not torch.equal(p, values[name]) for name, p in adapter_values(model).items() if "logits" in name)


def test_resuming_from_a_topk_checkpoint_is_refused_by_name(tmp_path):
    run = trainer(adapted(save_only_topk_weights=True), tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    with pytest.raises(AdapterFileError, match="top-k"):
        trainer(adapted(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_taken_too(copied, tmp_path):
    model = copied(adapted())
    assert type(model) is type(adapted())
    trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    assert (tmp_path / "checkpoint-4" / WEIGHTS).is_file()


def test_the_model_is_an_instance_of_pefts_class_and_of_no_other_task():
    peft = pytest.importorskip("peft")
    model = adapted()
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert isinstance(adapted(task_type=None), peft.PeftModel)
    assert not isinstance(model, (peft.PeftModelForSeq2SeqLM, peft.PeftMixedModel))
    assert type(model).__mro__[-2] is torch.nn.Module
    assert not any(name.startswith("peft") for name in (kind.__module__ for kind in type(model).__mro__))


def test_the_type_of_a_model_can_be_assigned():
    """FSDP does so to wrap a module in place."""
    model = adapted()
    kind = type("Wrapped", (model.__class__,), {})
    model.__class__ = kind
    assert type(model) is kind
    assert torch.equal(outputs(model), outputs(adapted()))


# Run in a fresh interpreter, in which Python finds no peft: importing it fails, and looking for it finds nothing.
WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None
import {first}
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("first", ["transformers.trainer", "vblora_triton.peft_model"])
def test_all_of_this_holds_without_peft(first):
    if sys.modules.get("peft", 0) is None:
        pytest.skip("this is the run without peft")
    code = WITHOUT_PEFT.format(first=first)
    # In either order of imports; the others are run without peft by `make test-without-peft`.
    chosen = ["-k", "checkpoints_hold or best_model or resumed"]
    command = [sys.executable, "-c", code, str(Path(__file__).relative_to(ROOT)), *chosen]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout


def test_making_a_model_leaves_transformers_alone_where_peft_is_installed():
    pytest.importorskip("peft")
    from transformers import trainer, trainer_utils

    adapted()
    assert trainer_utils._is_peft_model.__module__ == "transformers.trainer_utils"
    assert trainer._is_peft_model is trainer_utils._is_peft_model
    assert trainer.PeftModel is sys.modules["peft"].PeftModel

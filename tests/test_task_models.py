"""The classes of the tasks: the arguments that each takes, and that they are there for whoever needs one."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import some_ids, tiny_llama
from vblora_triton import TaskType, VBLoRAConfig, get_peft_model, use_backend
from vblora_triton.task_models import TASK_CLASSES

ROOT = Path(__file__).parents[1]
FIELDS = {"r": 3, "num_vectors": 10, "vector_length": 16, "target_modules": ["v_proj"]}


@pytest.mark.parametrize("task", list(TaskType))
def test_arguments_have_pefts_names_in_pefts_order(task):
    peft = pytest.importorskip("peft")
    here, there = (kind.forward for kind in (TASK_CLASSES[task], getattr(peft, TASK_CLASSES[task].__name__)))
    # task_ids are for methods that learn prompts.
    expected = [name for name in inspect.signature(there).parameters if name != "task_ids"]
    assert list(inspect.signature(here).parameters) == expected


def test_arguments_are_taken_by_name_and_in_order_and_none_means_left_out():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, task_type="CAUSAL_LM")).eval()
    ids = some_ids()
    expected = model.get_base_model()(input_ids=ids, labels=ids)
    for result in (model(ids, None, None, ids), model(ids, labels=ids, return_dict=None)):
        assert torch.equal(result.logits, expected.logits)
        assert torch.equal(result.loss, expected.loss)
    given = []
    model.get_base_model().register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    model(ids, None, inputs_embeds=None, position_ids=None, use_cache=False)
    assert given[0].keys() == {"input_ids", "position_ids", "use_cache"}
    with pytest.raises(TypeError, match=r"takes 7 arguments by position, input_ids, .* but got 8"):
        model(ids, *[None] * 7)
    with pytest.raises(TypeError, match="input_ids"):
        model(ids, input_ids=ids)


def test_a_forward_by_task_compiles_to_one_graph():
    model = get_peft_model(tiny_llama(), VBLoRAConfig(**FIELDS, task_type="CAUSAL_LM")).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # What a compiler traces on a CPU; what runs there otherwise adds up in another order.
    with use_backend("reference"):
        expected = model(some_ids()).logits
    assert torch.equal(compiled(some_ids(), labels=some_ids()).logits, expected)


def test_whoever_imports_get_peft_model_has_every_task():
    code = "from vblora_triton.peft_model import TASK_CLASSES; print(len(TASK_CLASSES))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) == len(TaskType)

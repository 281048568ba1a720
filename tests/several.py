"""A small model that one process trains, or two together: how it is made, wrapped, and compared."""

import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models import VOCABULARY, adapted_by, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, parameter_groups
from vblora_triton.distributed import shard
from vblora_triton.optim import LazyAdamW

METHODS = {
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 12, "vector_length": 16, "target_modules": "all-linear"}),
    "vera": (VeraConfig, {"r": 8, "target_modules": "all-linear"}),
}


def made(method, narrow=False, seed=0):
    """A small Llama with an adapter to be trained: all in float64, or a base in bfloat16 and an adapter in float32."""
    if narrow:
        return adapted_by(*METHODS[method], base=tiny_llama().bfloat16()).train()
    return adapted_by(*METHODS[method], seed=seed).double().train()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows():
    return torch.randint(0, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(3))


def own_rows():
    """Every second row, as a sampler deals them out."""
    return rows()[dist.get_rank() :: dist.get_world_size()]


def backward(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def gradients(model):
    return {
        name.removeprefix("module."): whole(parameter.grad).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def wrapped_in_layers(model):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_and_replicated(model):
    """HSDP: all parts in each of two groups of processes, here of one."""
    return shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))


# What users do, and our own call for it.
WRAPPINGS = {
    "ddp": DistributedDataParallel,
    "layers": wrapped_in_layers,
    "root": fully_shard,
    "shard": partial(shard, reshard_after_forward=True),
    "hybrid": sharded_and_replicated,
}


def optimizer_of(model):
    groups = parameter_groups(model, weight_decay=0.01)
    return LazyAdamW(groups, topk=2) if groups[0]["name"] == "vector_bank" else torch.optim.AdamW(groups)


def step(model, optimizer, ids):
    optimizer.zero_grad()
    backward(model, ids)
    optimizer.step()


def trained_state(model):
    parameters = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: whole(parameter.detach()).clone() for name, parameter in parameters.items()}


def assert_near(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


def page():
    """What the Python of docs/several-gpus.md defines."""
    text = (Path(__file__).parents[1] / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


class Sent(TorchDispatchMode):
    """Counts the bytes that are handed to all-reduce; DDP broadcasts buffers besides."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "c10d::allreduce_":
            self.bytes += sum(t.numel() * t.element_size() for t in args[0])
        return func(*args, **kwargs or {})


def trained_as_the_page_says(folder):
    """By its Trainer, for a step: what is trained then, and the bytes that were sent for it."""
    names = page()
    data = [{"input_ids": row, "labels": row} for row in rows()]
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no"}
    trainer = names["trainer"](folder, data, disable_tqdm=True, **settings)
    trainer.add_callback(names["SendSelectedLogits"](trainer))
    with Sent() as sent:
        trainer.train()
    assert [group["lr"] for group in names["lazy"](trainer.model).param_groups] == [1e-3, 1e-2]
    return trained_state(trainer.model), sent.bytes


def sharded_as_the_page_says():
    model, optimizer = page()["sharded"](made("vblora"), 1e-3)
    step(model, optimizer, own_rows())
    return [isinstance(parameter, DTensor) for parameter in model.parameters()]

"""Two processes on gloo that train adapters on quantised bases."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tests.models import adapted_by, tiny_llama
from tests.quantised import quantised_model
from tests.several import METHODS, WRAPPINGS, backward, gradients, own_rows, rows
from vblora_triton.distributed import shard

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def made_on(name, method, storage=torch.uint8):
    """A small Llama whose base is quantised, and checkpointed; the adapter is in float32."""
    base = quantised_model(name, tiny_llama(intermediate_size=128), storage=storage)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted_by(*METHODS[method], base=base).train()


def many_rows():
    """More tokens, in each process too, than layers take that are called as modules."""
    return torch.cat([rows(), rows().flip(1)])


def gradients_on(name, method, wrapping, storage):
    """The gradients of a second step, by when bitsandbytes has put the scales back that FSDP takes from parameters."""
    model = WRAPPED[wrapping](made_on(name, method, storage))
    for _ in range(2):
        model.zero_grad()
        backward(model, many_rows()[dist.get_rank() :: 2])
    return gradients(model), {type(parameter).__name__ for parameter in model.state_dict().values()}


# DDP sends what the first process has to the others at first, which torchao's weights do not take.
WRAPPED = {**WRAPPINGS, "unsynced": partial(DistributedDataParallel, init_sync=False)}


@pytest.mark.parametrize(
    ("name", "storage", "method", "wrapping"),
    [
        ("nf4", torch.bfloat16, "vblora", "shard"),
        ("nf4", torch.uint8, "vera", "shard"),
        ("nf4", torch.bfloat16, "vera", "ddp"),
        ("int8", None, "vblora", "ddp"),
        ("torchao int8", None, "vblora", "unsynced"),
    ],
)
def test_gradients_on_quantised_weights_are_those_of_one_process(name, storage, method, wrapping, pair):
    model = made_on(name, method)
    backward(model, many_rows())
    wanted = gradients(model)
    for found, kinds in pair(gradients_on, name, method, wrapping, storage):
        assert ("DTensor" in kinds) == (wrapping == "shard")
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert (found[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max() > 0, key


def refusals_of_shard():
    packed, said = shard(made_on("nf4", "vera", torch.bfloat16)), []
    for cast in (packed.half, packed.double):
        with pytest.raises(ValueError, match=r"q_proj\.base_layer, a .*Linear4bit, is kept in torch\.bfloat16 and"):
            cast()
    packed.bfloat16()
    for name in ("int8", "torchao int8", "torchao fp8"):
        model = made_on(name, "vera")
        try:
            shard(model)
        except ValueError as error:
            said.append(str(error))
        assert not any(isinstance(module, FSDPModule) for module in model.modules())
        backward(model, own_rows())
    return said


def test_weights_that_fsdp2_cannot_split_are_named_and_those_that_it_did_are_not_cast(pair):
    for said in pair(refusals_of_shard):
        assert [message.split(";")[0].rpartition(" ")[2] for message in said] == [
            "Int8Params", "Int8Tensor", "Float8Tensor"
        ]  # fmt: skip

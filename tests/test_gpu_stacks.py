"""On a GPU, natively: the kernels under compilers, the wrappers of several processes, and over quantised base layers.

Each case against plain PyTorch on the same GPU; what there is to say beyond that, CPU tests say.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.models import DEVICE, VOCABULARY, enlarge, tiny_llama
from tests.several import whole
from tests.tolerance import relative_error
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model, use_backend
from vblora_triton.distributed import average_selected_logits, shard
from vblora_triton.integrations import quantization

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = {
    "vblora": lambda targets: VBLoRAConfig(r=2, num_vectors=12, vector_length=16, target_modules=targets),
    "vera": lambda targets: VeraConfig(r=16, target_modules=targets),
}
both_methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def model(method):
    """A small Llama in training, of float32."""
    base = tiny_llama(intermediate_size=128).to(DEVICE)
    return enlarge(get_peft_model(base, METHODS[method]("all-linear"))).train()


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(function, trained: nn.Module, rows: int = 2) -> dict[str, torch.Tensor]:
    """The loss and every gradient of a step."""
    trained.zero_grad()
    ids = torch.randint(0, VOCABULARY, (rows, 24), generator=torch.Generator().manual_seed(rows)).to(DEVICE)
    loss = function(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in trained.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **{name: whole(grad).clone() for name, grad in found.items()}}


def by_pytorch(trained: nn.Module, rows: int = 2) -> dict[str, torch.Tensor]:
    with use_backend("reference"):
        return gradients(trained, trained, rows)


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-4, name


@both_methods
def test_a_compiled_step_is_right_and_another_batch_compiles_nothing(model):
    expected = [by_pytorch(model, rows) for rows in (2, 3, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    assert_alike(gradients(compiled, model, 2), expected[0])
    assert_alike(gradients(compiled, model, 3), expected[1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_alike(gradients(compiled, model, 4), expected[2])


@both_methods
def test_ddp_gives_the_gradients_of_the_model(model, method, one_process):
    expected = by_pytorch(model)
    ddp = DistributedDataParallel(model)
    if method == "vblora":
        average_selected_logits(ddp)
    # From the second step on layers are computed together, and DDP's buckets are sorted anew.
    for _ in range(3):
        assert_alike(gradients(ddp, ddp), expected)


@both_methods
def test_fsdp2_gives_the_gradients_of_the_model(model, one_process):
    expected = by_pytorch(model)
    sharded = shard(model, reshard_after_forward=True)
    for _ in range(3):
        assert_alike(gradients(sharded, sharded), expected)


def nf4() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")


def int8_of_torchao() -> nn.Module:
    quantisation = pytest.importorskip("torchao.quantization")
    layers = nn.Sequential(nn.Linear(128, 64))
    quantisation.quantize_(layers, quantisation.Int8WeightOnlyConfig())
    return layers[0]


@both_methods
@pytest.mark.parametrize("make", [nf4, int8_of_torchao])
def test_a_quantised_layer_trains_as_its_dequantised_weight_does(make, method):
    torch.manual_seed(0)
    layer = make().to(DEVICE)
    plain = nn.Linear(128, 64, device=DEVICE)
    with torch.no_grad():
        plain.weight.copy_(quantization.weight(layer))
        plain.bias.copy_(layer.bias)
    x, dy = torch.randn(300, 128, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    results = []
    for base in (layer, plain):
        adapted = enlarge(get_peft_model(nn.Sequential(base), METHODS[method](["0"]))).train()
        own = x.clone().requires_grad_()
        y = adapted(own)
        y.backward(dy)
        trained = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": own.grad, **trained})
    assert_alike(*results)

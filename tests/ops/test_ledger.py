"""What one adapted linear costs: kernel launches, what backward keeps, and what is never made."""

import pytest
import torch

from tests.models import DEVICE, adapted_linear
from tests.ops.linear_case import LinearCase
from vblora_triton import ops
from vblora_triton.kernels.launch import counted, intercepted

FORWARD = ["_select_kernel", "_shrink_fwd_kernel", "_expand_fwd_kernel"]
BACKWARD = ["_expand_bwd_kernel", "_sum_partials_kernel", "_shrink_bwd_kernel", "_parameter_grads_kernel"]
# The linear of the issue: Llama-2-7B's q at 4096 tokens, bf16 activations, fp32 parameters. Nothing is computed on it.
LARGE = LinearCase(M=4096, K=4096, N=4096, r=4, h=256, b=256, dtype=torch.bfloat16)


def launches(function) -> list[str]:
    with counted() as names:
        function()
    return names


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_training_takes_three_launches_forward_and_four_backward(dropout_p):
    case = LinearCase(M=130, K=256, N=512, b=64)
    tensors = case.tensors()
    dy = tensors.pop("dy")
    options = {"dropout_p": dropout_p, "training": True, "backend": "triton"}
    with counted() as names:
        y = ops.vblora_linear(*tensors.values(), case.k, **options)
        forward = list(names)
        y.backward(dy)
    assert forward == FORWARD
    assert names[len(forward) :] == BACKWARD


def test_from_a_selection_few_tokens_take_two_launches_and_many_mix_A_first():
    for M, first in ((1, []), (16, []), (17, ["_compose_fwd_kernel"])):
        case = LinearCase(M=M)
        x, base, logits_A, logits_B, bank, _ = case.tensors().values()
        selection = ops.select(logits_A, logits_B, case.k, backend="triton")
        tensors = (x, base, *selection, bank)
        found = launches(lambda t=tensors: ops.vblora_linear_selected(*t, backend="triton"))
        assert found == first + FORWARD[1:]


def test_nothing_is_launched_for_no_tokens():
    case = LinearCase(M=0)
    assert launches(lambda: case.run(ops.vblora_linear, case.tensors(), backend="triton")) == []


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        (["x"], BACKWARD[:3]),
        (["base"], []),
        (["logits_B"], [BACKWARD[0], BACKWARD[3]]),
        (["logits_A"], BACKWARD),
        (["vector_bank"], BACKWARD),
    ],
    ids=str,
)
def test_backward_launches_only_what_is_needed(needed, expected):
    case = LinearCase(M=130, K=256, N=512, b=64)
    tensors = case.tensors()
    dy = tensors.pop("dy")
    for name, t in tensors.items():
        t.requires_grad_(name in needed)
    y = ops.vblora_linear(*tensors.values(), case.k, backend="triton")
    assert launches(lambda: y.backward(dy)) == expected


@torch.no_grad()
def test_evaluation_takes_the_three_launches_of_training_in_every_call():
    # What logits select is not kept: a write through .data would make it false, and nothing tells of such a write.
    for M in (1, 16, 20):
        layer, x = adapted_linear().eval().requires_grad_(False), torch.randn(M, 32, device=DEVICE)
        assert [launches(lambda x=x, layer=layer: layer(x)) for _ in range(3)] == [FORWARD] * 3


def test_evaluation_follows_logits_that_a_fused_optimizer_writes_to():
    layer, x = adapted_linear().eval(), torch.randn(20, 32, device=DEVICE)
    optimizer = torch.optim.AdamW([p for n, p in layer.named_parameters() if "logits" in n], lr=1.0, fused=True)
    for _ in range(4):
        with torch.no_grad():
            evaluated = layer(x)
        y = layer(x)
        torch.testing.assert_close(evaluated, y)
        y.square().sum().backward()
        optimizer.step()


@torch.no_grad()
def test_nothing_is_remembered_of_tensors_that_come_and_go():
    layer, x = adapted_linear().eval().requires_grad_(False), torch.randn(20, 32, device=DEVICE)
    for _ in range(10):
        own = {n: torch.randn_like(p) for n, p in layer.named_parameters() if "logits" in n}
        bank = layer.vblora_vector_bank["default"]
        expected = ops.vblora_linear(
            x, layer.base_layer(x), own["vblora_logits_A.default"], own["vblora_logits_B.default"], bank, 2
        )
        torch.testing.assert_close(torch.func.functional_call(layer, own, (x,)), expected)


@torch.no_grad()
def test_fake_tensors_leave_nothing_behind():
    layer, x = adapted_linear().eval().requires_grad_(False), torch.randn(20, 32, device=DEVICE)
    expected = layer(x)
    layer.eval()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        layer(mode.from_tensor(x))
    assert torch.equal(layer(x), expected)


def test_training_and_gradients_in_evaluation_take_three_launches():
    layer, x = adapted_linear(), torch.randn(20, 32, device=DEVICE)
    for mode in (True, False):
        layer.train(mode)
        for _ in range(2):
            assert launches(lambda: layer(x)) == FORWARD


def test_backward_keeps_x_by_reference_and_less_than_a_mebibyte_of_its_own():
    tensors = LARGE.tensors()
    del tensors["dy"]
    kept: list[torch.Tensor] = []
    with (
        intercepted(lambda *_: None),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        for _ in "qkv":
            ops.vblora_linear(*tensors.values(), LARGE.k, backend="triton" if DEVICE == "cpu" else "auto")
    given = {t.untyped_storage().data_ptr() for t in tensors.values()}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    # q, k and v read one x, and all three keep that one.
    x = tensors["x"].untyped_storage().data_ptr()
    assert sum(t.untyped_storage().data_ptr() == x and t.dtype == torch.bfloat16 for t in kept) == 3
    assert sum(size for pointer, size in own.items() if pointer not in given) < 3 * 2**20
    largest = max(t.numel() for t in kept if t.untyped_storage().data_ptr() not in given)
    assert largest <= 4096 * 4, "s, (M, r), is the largest that it keeps of its own"


def test_no_launch_sees_a_wide_copy_of_an_activation_nor_a_composed_matrix_nor_a_mask():
    tensors = LARGE.tensors()
    dy = tensors.pop("dy")
    seen: list[tuple[str, str, torch.Tensor]] = []

    def look(kernel, grid, arguments):
        seen.extend((kernel.fn.__name__, name, t) for name, t in arguments.items() if isinstance(t, torch.Tensor))

    with intercepted(look):
        y = ops.vblora_linear(*tensors.values(), LARGE.k, dropout_p=0.1, training=True, backend="triton")
        y.backward(dy)
    M, K, r = LARGE.M, LARGE.K, LARGE.r
    assert {name for _, name, t in seen if t.numel() >= M * K} == {"X_ptr", "Base_ptr", "Y_ptr", "DY_ptr", "DX_ptr"}
    assert all(t.dtype == torch.bfloat16 for _, _, t in seen if t.numel() >= M * K)
    # What is (r, K), or (N, r), is a partial sum, never A or B.
    sized_like_A = {name for _, name, t in seen if t.shape[-2:] in ((r, K), (K, r))}
    assert sized_like_A <= {"DA_ptr", "DB_ptr", "S_ptr", "DS_ptr", "STotal_ptr", "V_ptr", "Out_ptr"}


@pytest.mark.parametrize("r", [1, 4, 8, 16, 33, 64])
def test_partial_sums_stay_small_beside_the_activations_at_every_rank(r):
    case = LinearCase(M=4096, K=2048, N=2048, r=r, h=256, b=256, dtype=torch.bfloat16)
    tensors = case.tensors()
    dy = tensors.pop("dy")
    largest = []

    def look(kernel, grid, arguments):
        activations = ("X_ptr", "Base_ptr", "Y_ptr", "DY_ptr", "DX_ptr")
        largest.extend(t.nbytes for n, t in arguments.items() if isinstance(t, torch.Tensor) and n not in activations)

    with intercepted(look):
        ops.vblora_linear(*tensors.values(), case.k, backend="triton").backward(dy)
    assert max(largest) <= case.M * case.N * 2 / 4, "a quarter of an activation"


def test_x_and_dy_are_each_read_by_one_launch_of_backward():
    tensors = LARGE.tensors()
    dy = tensors.pop("dy")
    with intercepted(lambda *_: None):
        y = ops.vblora_linear(*tensors.values(), LARGE.k, backend="triton")
    reads: list[str] = []

    def look(kernel, grid, arguments):
        for name, t in arguments.items():
            if isinstance(t, torch.Tensor) and t.numel() >= LARGE.M * LARGE.K:
                reads.append(f"{kernel.fn.__name__}.{name}")

    with intercepted(look):
        y.backward(dy)
    assert sorted(reads) == ["_expand_bwd_kernel.DY_ptr", "_shrink_bwd_kernel.DX_ptr", "_shrink_bwd_kernel.X_ptr"]

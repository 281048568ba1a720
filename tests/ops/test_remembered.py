"""A call's checks and its backend are remembered for arguments that are alike, and for no others."""

import pytest
import torch

from tests.ops.linear_case import LinearCase
from tests.ops.vera_case import VeraCase
from vblora_triton import ops


def arguments(**sizes):
    tensors = LinearCase(M=3, h=9, k=1, **sizes).tensors()
    del tensors["dy"]
    return tensors


def run(tensors, **options):
    with ops.backends_that_run() as ran:
        y = ops.vblora_linear(*tensors.values(), options.pop("topk", 1), **options)
    return y, ran


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: {"topk": True}, TypeError, "`topk` must be an int, not bool"),
        (lambda t: {"topk": 1.0}, TypeError, "`topk` must be an int, not float"),
        (lambda t: {"topk": 10}, ValueError, "`topk` is 10"),
        (lambda t: {"dropout_p": 2}, ValueError, "`dropout_p` is 2"),
        (lambda t: {"dropout_p": "0.0"}, TypeError, "`dropout_p` must be a number"),
        (lambda t: {"backend": "gpu"}, ValueError, "`backend` is 'gpu'"),
        (lambda t: t.update(base=t["base"][:2]) or {}, ValueError, "`base` has shape"),
        (lambda t: t.update(x=t["x"][:, 1:]) or {}, ValueError, "`logits_A` has shape"),
        (lambda t: t.update(x=t["x"].int()) or {}, TypeError, "`x` must be a floating tensor, not torch.int32"),
        (lambda t: t.update(x=None) or {}, TypeError, "`x` must be a floating tensor, not NoneType"),
        (lambda t: t.update(logits_B=t["logits_B"].to("meta")) or {}, ValueError, "`logits_B` is on meta"),
        (lambda t: t.update(vector_bank=[1]) or {}, TypeError, "`vector_bank` must be a floating tensor"),
    ],
)
def test_a_wrong_call_is_refused_after_a_right_one(change, error, message):
    tensors = arguments()
    run(tensors)
    options = change(tensors)
    for _ in range(2):
        with pytest.raises(error, match=message):
            run(tensors, **options)


def test_a_projection_that_is_trained_is_refused_after_one_that_is_not():
    case = VeraCase(M=3)
    tensors = case.tensors()
    case.run(ops.vera_linear, tensors)
    tensors["A"].requires_grad_()
    with pytest.raises(ValueError, match="`A` requires a gradient"):
        case.run(ops.vera_linear, tensors)


def test_the_backend_in_force_counts_at_each_call():
    tensors = arguments()
    assert run(tensors, backend="reference")[1] == {"reference"}
    assert run(tensors, backend="cpu")[1] == {"cpu"}
    for backend in ("reference", "cpu", "reference"):
        with ops.use_backend(backend):
            assert run(tensors)[1] == {backend}


def test_gradients_that_are_recorded_and_dropout_choose_anew():
    tensors = arguments()
    selection = ops.select(tensors.pop("logits_A"), tensors.pop("logits_B"), 1, backend="reference")
    x, base, bank = tensors.values()
    for grad, backend in ((False, "cpu"), (True, "reference"), (False, "cpu")):
        with torch.set_grad_enabled(grad), ops.backends_that_run() as ran:
            ops.vblora_linear_selected(x.cpu(), base.cpu(), *(t.cpu() for t in selection), bank.cpu())
        assert ran == {backend}
    tensors = {name: t.cpu() for name, t in arguments().items()}
    for p, backend in ((0.0, "cpu"), (0.5, "reference"), (0.0, "cpu")):
        assert run(tensors, dropout_p=p, training=True)[1] == {backend}
    with torch.no_grad():
        assert torch.equal(run(tensors, dropout_p=1.0, training=True)[0], tensors["base"])


def test_autocast_calls_the_base_that_the_op_would_have_computed():
    tensors = {name: t.detach().cpu() for name, t in arguments().items()}
    x, N = tensors["x"].float(), tensors["base"].shape[1]
    base = ops.FrozenLinear(torch.randn(N, x.shape[1]))
    rest = [tensors[name].float() for name in ("logits_A", "logits_B", "vector_bank")]
    for _ in range(2):
        assert ops.vblora_linear(x, base, *rest, 1).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.vblora_linear(x, base, *rest, 1).dtype == torch.bfloat16


def test_calls_under_a_transform_are_not_taken_for_others_nor_others_for_them():
    x, *rest = (t.detach().cpu() for t in arguments().values())
    for transformed in (False, True, False):
        with ops.backends_that_run() as ran:
            if transformed:
                torch.func.grad(lambda x: ops.vblora_linear(x, *rest, 1).sum())(x)
            else:
                ops.vblora_linear(x.clone().requires_grad_(), *rest, 1)
        assert ran == {"reference" if transformed else "cpu"}

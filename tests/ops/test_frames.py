"""How far it is from a layer's forward to the first launch, in functions of this package on Python's stack."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models import DEVICE, tiny_llama
from vblora_triton import VBLoRAConfig, VeraConfig, get_peft_model
from vblora_triton.kernels.launch import intercepted
from vblora_triton.tuner.linear import AdaptedLinear

ROOT = Path(__file__).parents[2]
MOST = 7
SIZES = {"vblora": {"r": 2, "num_vectors": 6, "vector_length": 16}, "vera": {"r": 8}}


class LaunchedError(Exception):
    """Ends a forward at its first launch."""


def frames_to_the_first_launch(model: nn.Module, ids: torch.Tensor) -> list[str]:
    """The functions from the adapted layer's forward, which comes first, to the launch."""
    found: list[str] = []

    def stop(kernel, grid, arguments):
        for frame in inspect.stack()[1:]:
            path = Path(frame.filename).resolve()
            # Nor by way of torch's dispatcher, where nobody observes.
            assert path.name != "_ops.py"
            if any(path.is_relative_to(ROOT / own) for own in ("vblora_triton", "kernels")):
                found.append(f"{path.name}:{frame.function}")
            if frame.function == "forward" and isinstance(frame.frame.f_locals.get("self"), AdaptedLinear):
                break
        raise LaunchedError

    with intercepted(stop), pytest.raises(LaunchedError):
        model(input_ids=ids)
    return found[::-1]


@pytest.mark.parametrize("tokens", [8, 40], ids=["few-tokens", "many-tokens"])
@pytest.mark.parametrize("mode", ["training", "second-step", "dropout", "evaluation", "checkpointing", "hooked"])
@pytest.mark.parametrize("method", SIZES)
def test_from_a_layers_forward_to_the_first_launch_it_is_seven_functions(method, mode, tokens):
    config = {"vblora": VBLoRAConfig, "vera": VeraConfig}[method]
    options = {f"{method}_dropout": 0.1} if mode == "dropout" else {}
    model = get_peft_model(tiny_llama(), config(**SIZES[method], **options, target_modules=["q_proj", "v_proj"]))
    model.to(DEVICE).train(mode != "evaluation").requires_grad_(mode != "evaluation")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for _, layer in model.base_model.adapted_layers():
        layer.backend = "triton"
        if mode == "hooked":
            # What somebody else may hold is not written to.
            layer.base_layer.register_forward_hook(lambda module, inputs, output: None)
    if mode == "second-step":
        # What the first layer reads has a gradient, and is known to be read by others too.
        model.enable_input_require_grads()
        with intercepted(lambda *launch: None):
            model(input_ids=torch.arange(tokens, device=DEVICE)[None])
    with torch.set_grad_enabled(mode != "evaluation"):
        frames = frames_to_the_first_launch(model, torch.arange(tokens, device=DEVICE)[None])
    assert frames[0] == "linear.py:forward"
    assert frames[-1] == "launch.py:launch"
    assert len(frames) <= MOST, frames

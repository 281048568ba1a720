"""PEFT's refusal to train an adapter that was loaded with top-k weights only, kept by patch_peft with few looks."""

import gc

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from tests.integrations.peft_case import DEVICE, by_peft, logits, peft_layers
from tests.models import tiny_llama
from vblora_triton import patch_peft

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def only_topk(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of the adapter as PEFT has it after loading a file with top-k weights only."""
    state = peft.get_peft_model_state_dict(model)
    for name, value in state.items():
        if "logits" in name:
            threshold = value.topk(2, dim=-1).values[..., -1:]
            state[name] = value.where(value >= threshold, float("-inf"))
    return state


def test_training_of_a_topk_adapter_is_refused_and_its_use_is_not(tmp_path):
    model = by_peft("vblora", save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path).eval().to(DEVICE)
    expected = logits(loaded)
    with patch_peft():
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            logits(loaded.train())
        assert logits(loaded.eval()).isfinite().all()


@pytest.mark.parametrize("fused", [False, True], ids=["counted versions", "fused"])
def test_logits_are_looked_at_once_and_again_after_a_load_but_not_after_a_step(fused, monkeypatch):
    model = by_peft("vblora").train()
    state = only_topk(model)
    looks = []
    isinf = torch.Tensor.isinf
    monkeypatch.setattr(torch.Tensor, "isinf", lambda tensor: looks.append(tensor) or isinf(tensor))
    trained = [p for p in model.parameters() if p.requires_grad]
    with patch_peft():
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)
        for _ in range(3):
            logits(model).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(looks) == len(peft_layers(model))
        finite = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
        peft.set_peft_model_state_dict(model, finite)
        logits(model)
        assert len(looks) == 2 * len(peft_layers(model))
        peft.set_peft_model_state_dict(model, state)
        with pytest.raises(RuntimeError) as own:
            logits(model)
    with pytest.raises(RuntimeError) as theirs:
        logits(model)
    assert str(own.value) == str(theirs.value)


def test_logits_written_to_between_a_look_and_a_step_are_looked_at_after_it():
    model = by_peft("vblora").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with patch_peft():
        logits(model).square().sum().backward()
        with torch.no_grad():
            peft_layers(model)[0].vblora_logits_A["default"][0, 0, 1:] = float("-inf")
        optimizer.step()
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            logits(model)


def test_steps_of_other_optimizers_go_on_when_the_trained_model_is_gone():
    other = nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    steps = []
    with patch_peft():
        model = by_peft("vblora").train()
        logits(model)
        del model
        gc.collect()
        later = torch_optimizer.register_optimizer_step_post_hook(lambda *_: steps.append(1))
        torch.optim.SGD([other], lr=1.0).step()
        later.remove()
    assert steps == [1]
    assert torch.equal(other.detach(), torch.zeros(2))


def test_leaving_the_last_context_leaves_nothing_in_torchs_optimizers():
    def hooks() -> list[int]:
        kinds = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
        return [len(kind) for kind in kinds]

    before, model = hooks(), by_peft("vblora").train()
    with patch_peft(), patch_peft(model):
        logits(model)
        assert hooks() == [count + 1 for count in before]
    assert hooks() == before


def test_compiled_training_is_one_graph_and_refuses_topk_logits_when_compiled_and_when_stepped():
    torch._dynamo.reset()
    model = by_peft("vblora").train()
    finite = {name: value.clone() for name, value in peft.get_peft_model_state_dict(model).items()}
    infinite = {name: value.clone() for name, value in only_topk(model).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    with patch_peft():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for state, refused in ((finite, False), (finite, False), (infinite, True), (finite, False)):
            peft.set_peft_model_state_dict(model, state)
            logits(compiled).square().sum().backward()
            before = [p.detach().clone() for p in trained]
            if refused:
                with pytest.raises(RuntimeError, match="save_only_topk_weights"):
                    optimizer.step()
                assert all(torch.equal(p, then) for p, then in zip(trained, before, strict=True))
            else:
                optimizer.step()
            optimizer.zero_grad()
        peft.set_peft_model_state_dict(model, infinite)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="save_only_topk_weights"):
            logits(torch.compile(model, backend="eager"))

"""Two processes on gloo: they learn what one does of both batches, and DDP sends what is not zero."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tests.models import adapted_by, enlarge, tiny_llama
from tests.several import (
    METHODS,
    WRAPPINGS,
    Sent,
    assert_near,
    backward,
    gradients,
    made,
    optimizer_of,
    own_rows,
    rows,
    sharded_as_the_page_says,
    step,
    trained_as_the_page_says,
    trained_state,
)
from tests.test_readme import save_stand_in
from vblora_triton import (
    PeftModel,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    use_backend,
)
from vblora_triton.distributed import average_selected_logits, check_selections, shard

H = 2048


def two_steps(method, wrapping, use_reentrant=None, narrow=False):
    """The gradients of a second step, by which time much has been noted of the first."""
    model = made(method, narrow=narrow)
    if use_reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.get_base_model().enable_input_require_grads()
    model = WRAPPINGS[wrapping](model)
    for _ in range(2):
        model.zero_grad()
        backward(model, own_rows())
    return gradients(model)


def assert_equal_to_one_process(found, method, narrow=False):
    model = made(method, narrow=narrow)
    backward(model, rows())
    wanted = gradients(model)
    for own in found:
        assert own.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 0
            assert own[name].dtype == gradient.dtype
            assert (own[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("use_reentrant", [None, False], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_one_process(method, use_reentrant, wrapping, pair):
    assert_equal_to_one_process(pair(two_steps, method, wrapping, use_reentrant), method)


@pytest.mark.parametrize("method", METHODS)
def test_float32_adapters_are_not_rounded_beside_a_sharded_base_in_bfloat16(method, pair):
    assert_equal_to_one_process(pair(two_steps, method, "shard", narrow=True), method, narrow=True)


def sparse_and_dense(steps):
    """Bytes sent and gradients of DDP with and without the hook, over all steps of an accumulation."""
    found = []
    for sparse in (False, True):
        model = adapted_by(*METHODS["vblora"], num_vectors=H).train()
        model = DistributedDataParallel(model, bucket_cap_mb=1)
        if sparse:
            average_selected_logits(model)
        with Sent() as sent:
            # DDP sorts its buckets anew after the first step.
            for _ in range(2):
                model.zero_grad()
                with model.no_sync():
                    for _ in range(steps - 1):
                        backward(model, own_rows().flip(0))
                sent.bytes = 0
                backward(model, own_rows())
        found.append((sent.bytes, gradients(model)))
    return found


@pytest.mark.parametrize("steps", [1, 3])
def test_of_the_logits_ddp_sends_a_hundredth_and_gives_the_same_bits(steps, pair):
    for (dense_bytes, dense), (sparse_bytes, sparse) in pair(sparse_and_dense, steps):
        logits = sum(4 * gradient.numel() for name, gradient in dense.items() if "logits" in name)
        others = sum(4 * gradient.numel() for name, gradient in dense.items() if "logits" not in name)
        assert dense_bytes == logits + others
        assert others < sparse_bytes <= others + logits / 100
        for name, gradient in dense.items():
            assert torch.equal(sparse[name], gradient), name
            assert gradient.any()


class Either(nn.Module):
    """The first process goes through both layers, the second one through the first alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(self.first(x)) if dist.get_rank() == 0 else self.first(x)


def gradients_of_unused_layers():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = enlarge(get_peft_model(Either(), VBLoRAConfig(**METHODS["vblora"][1])))
        model = DistributedDataParallel(model, find_unused_parameters=True)
        if sparse:
            average_selected_logits(model)
        model(torch.randn(5, 32)).square().sum().backward()
        found.append(gradients(model))
    return found


def test_a_layer_that_one_process_does_not_use_gets_the_same_bits(pair):
    for dense, sparse in pair(gradients_of_unused_layers):
        assert all(torch.equal(sparse[name], gradient) and gradient.any() for name, gradient in dense.items())
        assert any("second" in name for name in dense)


def patched_gradients():
    from peft import VBLoRAConfig as PeftsConfig
    from peft import get_peft_model as pefts

    from vblora_triton import patch_peft

    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = enlarge(
            pefts(nn.Sequential(nn.Linear(32, 32)), PeftsConfig(**METHODS["vblora"][1] | {"target_modules": ["0"]}))
        )
        with patch_peft(model):
            model = DistributedDataParallel(model)
            if sparse:
                average_selected_logits(model)
            model(torch.randn(5, 32)).square().sum().backward()
        found.append(gradients(model))
    return found


def test_pefts_own_model_patched_gets_the_same_bits(pair):
    pytest.importorskip("peft")
    for dense, sparse in pair(patched_gradients):
        assert all(torch.equal(sparse[name], gradient) and gradient.any() for name, gradient in dense.items())


def selections_checked(differ):
    model = made("vblora")
    check_selections(model)
    if differ and dist.get_rank() == 1:
        logits = next(
            parameter for name, parameter in model.named_parameters() if "1.mlp.up_proj.vblora_logits_B" in name
        )
        with torch.no_grad():
            # Two entries of one row change places.
            logits[0, 0] = logits[0, 0].flip(0)
    try:
        check_selections(model)
    except RuntimeError as error:
        return str(error)


def test_every_process_is_told_where_another_one_selects_other_vectors(pair):
    assert pair(selections_checked, False) == [None, None]
    one, two = pair(selections_checked, True)
    assert one == two
    assert "in 1 of 28 tensors of logits" in one
    assert "layers.1.mlp.up_proj.vblora_logits_B" in one


def refused():
    for model in (made("vblora"), DistributedDataParallel(made("vera"))):
        try:
            average_selected_logits(model)
        except (TypeError, ValueError) as error:
            yield f"{type(error).__name__}: {error}"


def refusals():
    return list(refused())


def test_what_sends_no_logits_is_refused(pair):
    for plain, vera in pair(refusals):
        assert plain.startswith("TypeError: `model` is a PeftModel; give a torch.nn.parallel.DistributedDataParallel")
        assert vera.startswith("ValueError: `model` trains no logits of VB-LoRA")


def save(model, folder):
    """As users do: of a sharded model by all processes, of one that each has whole by the first."""
    if isinstance(model, FSDPModule) or dist.get_rank() == 0:
        getattr(model, "module", model).save_pretrained(folder)
    dist.barrier()


def train_save_and_resume(method, wrapping, folder):
    """Two steps, saved in full and as top-k; from the full file a third one, in a model that was wrapped before."""
    model = WRAPPINGS[wrapping](made(method))
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer, own_rows())
    model.eval()
    with torch.no_grad():
        # After this FSDP holds what does not belong to a block in one piece.
        model(input_ids=own_rows())
    save(model, f"{folder}/full")
    if method == "vblora":
        config = getattr(model, "module", model).peft_config["default"]
        config.save_only_topk_weights = True
        save(model, f"{folder}/topk")
        config.save_only_topk_weights = False
    resumed = WRAPPINGS[wrapping](made(method, seed=5).train())
    with torch.no_grad():
        resumed(input_ids=own_rows())
    getattr(resumed, "module", resumed).load_adapter(f"{folder}/full", "default", is_trainable=True)
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    step(resumed, again, own_rows())
    return trained_state(resumed)


@pytest.mark.parametrize("wrapping", ["ddp", "layers", "root"])
@pytest.mark.parametrize("method", METHODS)
def test_training_saves_what_one_process_saves_and_resumes_as_it_goes_on(method, wrapping, pair, tmp_path):
    resumed = pair(train_save_and_resume, method, wrapping, str(tmp_path))
    model = made(method)
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer, rows())
    wanted = get_peft_model_state_dict(model)
    assert_near(load_file(tmp_path / "full" / "adapter_model.safetensors"), wanted)
    if method == "vblora":
        found = load_file(tmp_path / "topk" / "adapter_model.safetensors")
        logits = wanted["base_model.model.model.layers.1.mlp.up_proj.vblora_logits_B"]
        values, indices = logits.topk(2)
        key = "base_model.model.model.layers.1.mlp.up_proj.vblora_logits_B_topk_"
        assert torch.equal(found[key + "indices"].long(), indices)
        assert_near({"weights": found[key + "weights"].double()}, {"weights": values.softmax(-1)[..., :-1]})
    loaded = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / "full")
    with torch.no_grad():
        assert_near({"y": loaded(input_ids=rows()).logits}, {"y": model.eval()(input_ids=rows()).logits})
    step(model.train(), optimizer, rows())
    for state in resumed:
        assert_near(state, trained_state(model))


def reentrant_gradients():
    model = made("vblora")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.get_base_model().enable_input_require_grads()
    model = DistributedDataParallel(model, static_graph=True)
    backward(model, own_rows())
    return gradients(model)


def test_reentrant_checkpoints_work_with_what_the_error_says(pair):
    assert_equal_to_one_process(pair(two_steps, "vera", "ddp", True), "vera")
    assert_equal_to_one_process(pair(reentrant_gradients), "vblora")


def kernels_gradients():
    """By the kernels, under the interpreter: q and k computed as one from the second step on."""
    layers = {"target_modules": r".*layers\.1.*\.[qk]_proj", "num_vectors": 12, "r": 1, "vector_length": 32}
    found = []
    for sharded in (False, True):
        model = adapted_by(VBLoRAConfig, layers, tiny_llama()).train()
        model = shard(model) if sharded else model
        with use_backend("triton"):
            for _ in range(2):
                model.zero_grad()
                backward(model, rows()[:2, :3])
        found.append(gradients(model))
    return found


def test_kernels_find_the_weights_that_fsdp_takes_apart_and_brings_back(pair):
    for alone, sharded in pair(kernels_gradients):
        assert_near(sharded, alone)
        assert all(gradient.any() for gradient in alone.values())


def sharded_pefts_gradients():
    from peft import VBLoRAConfig as PeftsConfig
    from peft import get_peft_model as pefts

    from vblora_triton import patch_peft

    found = []
    for sharded in (False, True):
        model = enlarge(pefts(tiny_llama(), PeftsConfig(**METHODS["vblora"][1]))).double().train()
        with patch_peft(model):
            model = shard(model) if sharded else model
            backward(model, own_rows() if sharded else rows())
        found.append(gradients(model))
    return found


def test_pefts_own_model_whose_layers_register_the_bank_is_sharded(pair):
    pytest.importorskip("peft")
    for alone, sharded in pair(sharded_pefts_gradients):
        assert_near(sharded, alone)


def test_trainer_of_the_page_trains_all_processes_alike_and_sends_what_is_selected(pair, tmp_path):
    save_stand_in(tmp_path)
    (one, sent), (two, _) = pair(trained_as_the_page_says, str(tmp_path / "facebook" / "opt-125m"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    dense = sum(4 * tensor.numel() for tensor in one.values())
    bank = sum(4 * tensor.numel() for name, tensor in one.items() if "bank" in name)
    # Trainer gathers losses besides, a few numbers.
    assert bank < sent < bank + 0.02 * (dense - bank)


def test_the_pages_fsdp2_trains(pair):
    assert all(all(sharded) for sharded in pair(sharded_as_the_page_says))


def generated():
    """What a sharded model writes, and what it writes whole."""
    given = {"input_ids": rows()[:1], "max_new_tokens": 4, "do_sample": False}
    return shard(made("vblora")).eval().generate(**given), made("vblora").eval().generate(**given)


def test_a_sharded_model_generates(pair):
    for sharded, alone in pair(generated):
        assert torch.equal(sharded, alone)


def copies_in_blocks(sharded):
    """Gradients of a model that trains a module of each block whole, in bfloat16, beside adapters in float32."""
    model = adapted_by(VBLoRAConfig, METHODS["vblora"][1], tiny_llama().bfloat16(), modules_to_save=["input_layernorm"])
    for layer in model.get_base_model().model.layers:
        layer.input_layernorm.modules_to_save["default"].bfloat16()
    model = shard(model.train()) if sharded else model.train()
    backward(model, own_rows() if sharded else rows())
    return gradients(model)


def test_modules_trained_whole_in_another_dtype_have_groups_of_their_own(pair):
    alone = copies_in_blocks(False)
    assert {gradient.dtype for gradient in alone.values()} == {torch.bfloat16, torch.float32}
    for sharded in pair(copies_in_blocks, True):
        assert sharded.keys() == alone.keys()
        for name, gradient in alone.items():
            assert gradient.any()
            # Means of bfloat16 are rounded in another order.
            assert (sharded[name] - gradient).abs().max() <= 0.03 * gradient.abs().max(), name

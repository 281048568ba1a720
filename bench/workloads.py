"""What is adapted and run: one linear, a layer's seven linears, a whole model; made from sizes, with random weights."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import ALL_LINEARS, MODELS, Case
from bench.floors import Shape

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Directions of layers whose gradients are asked for.
WITH_GRADIENTS = ("fwd_grad", "bwd", "fwd_bwd")
# Sets of inputs that take turns.
SETS = 3


class Linears(nn.Module):
    """The linears of a transformer layer and nothing between them: o takes what q gives, down what gate gives.

    Args:
        shapes: (in, out) of each of ALL_LINEARS, or of `q_proj` alone.
    """

    def __init__(self, shapes: list[Shape], **make: Any) -> None:
        super().__init__()
        for name, (K, N) in zip(ALL_LINEARS, shapes, strict=False):
            setattr(self, name, nn.Linear(K, N, bias=False, **make))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not hasattr(self, "o_proj"):
            return (self.q_proj(x),)
        attended = self.o_proj(self.q_proj(x))
        return (
            self.k_proj(x),
            self.v_proj(x),
            self.up_proj(attended),
            self.down_proj(self.gate_proj(attended)),
        )


def make_base(case: Case, device: torch.device) -> nn.Module:
    """The frozen model of a case, with random weights that keep the size of what passes through."""
    make: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
    in_layers = case.suite in ("layer", "block")
    base = Linears(case.shapes(), **make) if in_layers else _llama(case, **make)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return base.requires_grad_(False)


def _llama(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODELS[case.shape], max_position_embeddings=4096, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy to adapt, whose parameters and buffers are the original's own memory."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, memo)


def common_name(name: str) -> str:
    """A parameter's name without what libraries put around it."""
    for part in ("_orig_mod.", "base_model.model.", "base_model.", "base_layer.", ".default"):
        name = name.replace(part, "")
    # PEFT registers the one bank in every layer, this package once, on the model.
    return "vblora_vector_bank" if name.endswith("vblora_vector_bank") else name


def draw_adapter(model: nn.Module) -> None:
    """Draw every trained parameter from its name: the same numbers whoever made the layer, and no update near zero."""
    scales = {"logits": 1.0, "vector_bank": 0.05, "lambda_d": 0.3, "lambda_b": 0.3, "lora_": 0.05}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = next((s for key, s in scales.items() if key in name), None)
            if scale is not None:
                generator = torch.Generator().manual_seed(zlib.crc32(common_name(name).encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


class Workload:
    """Inputs of a case, and what is done with them and a model in one direction.

    Args:
        direction: "fwd" (evaluation, nothing trained), "fwd_grad" (forward alone, gradients recorded), "bwd" (all
            gradients, of a forward that is not timed), "fwd_bwd" (both), or "step" (with AdamW).
    """

    def __init__(self, case: Case, direction: str, device: torch.device, seed: int = 0) -> None:
        self.case, self.direction, self.device = case, direction, device
        self._generator = torch.Generator(device).manual_seed(seed + 1)
        self.sets: list[Any] = [self._inputs() for _ in range(1 if case.suite in ("model", "decode") else SETS)]
        self._optimizers: dict[int, torch.optim.Optimizer] = {}

    def _inputs(self) -> Any:
        case = self.case
        if case.suite in ("layer", "block"):
            x = self._normal(case.M, case.shapes()[0][0]).requires_grad_(self.direction in WITH_GRADIENTS)
            outs = [case.shapes()[i][1] for i in ((0,) if case.suite == "layer" else (1, 2, 5, 6))]
            return x, [self._normal(case.M, out) for out in outs]
        # One token of each of M sequences, or `rows` sequences.
        shape = (case.M, 1) if case.suite == "decode" else (case.rows, case.M // case.rows)
        ids = torch.randint(MODELS[case.shape]["vocab_size"], shape, generator=self._generator, device=self.device)
        return ids, []

    def _normal(self, *shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.float32, device=self.device).normal_(generator=self._generator)
        return made.to(DTYPES[self.case.dtype])

    def prepare(self, model: nn.Module) -> nn.Module:
        """Switch a model to this direction's mode."""
        if self.direction == "fwd":
            return model.eval().requires_grad_(False)
        if self.case.checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def call(self, model: nn.Module) -> Callable[[int], dict[str, Tensor]]:
        """A function of the number of the run, which does the work and returns every result by name."""
        if self.direction == "step":
            return lambda i: self._step(model)
        if self.case.suite in ("decode", "model"):
            return lambda i: self._forward(lambda ids: (model(input_ids=ids).logits,), i)
        if self.direction == "fwd":
            return lambda i: self._forward(model, i)
        if self.direction == "fwd_grad":
            return lambda i: {f"y{j}": out for j, out in enumerate(model(self.sets[i % len(self.sets)][0]))}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        names = ["dx", *("d " + common_name(name) for name in trained)]

        # A forward that is not timed is kept, and gone back through again and again.
        kept = [model(x) for x, _ in self.sets] if self.direction == "bwd" else []

        def forward_backward(i: int) -> dict[str, Tensor]:
            x, dys = self.sets[i % len(self.sets)]
            outs = kept[i % len(self.sets)] if kept else model(x)
            grads = torch.autograd.grad(
                outs,
                [x, *trained.values()],
                [dy.to(o) for dy, o in zip(dys, outs, strict=True)],
                retain_graph=bool(kept),
            )
            return {f"y{j}": out for j, out in enumerate(outs)} | dict(zip(names, grads, strict=True))

        return forward_backward

    def _forward(self, model: Callable[[Tensor], tuple[Tensor, ...]], i: int) -> dict[str, Tensor]:
        with torch.no_grad():
            return {f"y{j}": out for j, out in enumerate(model(self.sets[i % len(self.sets)][0]))}

    def _step(self, model: nn.Module) -> dict[str, Tensor]:
        loss = self.backward(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        if trained:
            if id(model) not in self._optimizers:
                self._optimizers[id(model)] = torch.optim.AdamW(trained, lr=1e-4)
            self._optimizers[id(model)].step()
        model.zero_grad(set_to_none=True)
        return {"loss": loss}

    def backward(self, model: nn.Module) -> Tensor:
        """Loss and gradients of a whole model. A frozen one lets them pass to its embeddings, as adapters do."""
        ids = self.sets[0][0]
        if any(p.requires_grad for p in model.parameters()):
            loss = model(input_ids=ids, labels=ids).loss
        else:
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
            loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        return loss.detach()

    def results(self, model: nn.Module) -> dict[str, Tensor]:
        """What correctness is judged by: outputs, and gradients where there are any."""
        if self.direction != "step":
            return self.call(model)(0)
        found = {"loss": self.backward(model)}
        found |= {"d " + common_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    def held_bytes(self, model: nn.Module) -> int:
        """Bytes of a model and of its optimizer's state."""
        held = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
        optimizer = self._optimizers.get(id(model))
        for state in optimizer.state.values() if optimizer is not None else ():
            held |= {id(t): t.nbytes for t in state.values() if isinstance(t, Tensor)}
        return sum(held.values())

    def saved_kib(self, model: nn.Module) -> float | None:
        """What forward keeps for backward, beside the inputs, the parameters and the frozen matrices."""
        if self.direction not in WITH_GRADIENTS:
            return None
        x = self.sets[0][0]
        known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outs = model(x)
        del outs
        return sum(size for pointer, size in kept.items() if pointer not in known) / 1024

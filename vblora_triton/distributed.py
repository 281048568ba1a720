"""Several processes on torch.distributed: of the logits' gradient DDP sends what is not zero."""

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vblora_triton.integrations.quantization import is_plain
from vblora_triton.ops import selected_entries
from vblora_triton.tuner.sharding import is_sharded
from vblora_triton.vblora.layer import trained_logits


def average_selected_logits(model: DistributedDataParallel) -> None:
    """Let DDP average k of the h entries in each row of the logits' gradients: the others are zero in every process.

        g[row, index] <- 1/n sum_processes g[row, index]      index in top_k(logits[row]), n processes

    The parameters are equal in all processes, and so the selections are: indices are not sent. Each of DDP's messages
    holds, packed, these entries of its logits and the whole of its other gradients (the bank, heads, biases), scaled
    and added as DDP does without it: two processes get the same bits. With more of them a sum may be taken in another
    order, as it may wherever a message has another length.

    Call it once, when DDP has wrapped the model, before the first backward pass. `no_sync()` works: parameters do not
    change between the steps of an accumulation, nor do selections. So do unused layers, whose entries are sent as
    zeros. Gradients must be set to zero after each step of the optimizer, as all training loops do: what is left from
    other selections is not averaged. `check_selections` says whether selections are equal.

    Args:
        model: DDP around a model with VB-LoRA adapters that are trained, ours or PEFT's own under `patch_peft`.
    Raises:
        TypeError: `model` is not DDP's.
        ValueError: it trains no logits.
        RuntimeError: it has a communication hook already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(
            f"`model` is a {type(model).__name__}; give a torch.nn.parallel.DistributedDataParallel, such as "
            "`model_wrapped` of a Trainer that has begun to train."
        )
    model.register_comm_hook(_Hook(model.process_group, _logits(model)), _Hook.send)


def check_selections(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Check that all processes select the same vectors; all of them call it.

    One number for each tensor of logits is sent, a checksum of its indices.

    Args:
        model: a model with VB-LoRA adapters that are trained, wrapped or not.
        group: the processes; by default all.
    Raises:
        RuntimeError: they differ, in every process; the message names the first tensor.
        ValueError: it trains no logits, or is sharded.
    """
    sums = []
    topk = _logits(model)
    if any(map(is_sharded, topk)):
        raise ValueError(
            "FSDP2 has sharded `model`: its processes hold parts of the same logits, and bring them together to select "
            "from. There is nothing to compare; before `fully_shard` there is."
        )
    for parameter in topk:
        indices = selected_entries(parameter.detach(), topk[parameter])
        places = torch.arange(1, indices.numel() + 1, device=indices.device)
        sums.append(((indices.flatten() + 1) * places).sum())
    both = torch.stack([torch.stack(sums), -torch.stack(sums)])
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
    names = {parameter: name for name, parameter in model.named_parameters()}
    wrong = [
        names[parameter] for parameter, differs in zip(topk, (both[0] != -both[1]).tolist(), strict=True) if differs
    ]
    if wrong:
        raise RuntimeError(
            f"Processes select other vectors in {len(wrong)} of {len(topk)} tensors of logits, first in {wrong[0]}: "
            "their parameters differ. Load the same values in all of them, and let DDP wrap the model after that."
        )


def _logits(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the logits that a model trains, with the k of their adapter; ValueError if there are none."""
    found = trained_logits(model)
    if not found:
        raise ValueError("`model` trains no logits of VB-LoRA; their gradients are what would be sent in parts.")
    return found


class _Places(NamedTuple):
    """Where gradients are in a bucket of DDP's.

    rows: k -> its logits, and where each of their rows begins, (rows, 1).
    others: positions among the bucket's gradients of those that are sent whole.
    """

    rows: list[tuple[int, list[nn.Parameter], Tensor]]
    others: list[int]


class _Hook:
    """What DDP's communication hook knows: the processes, the k of each tensor of logits, and the buckets so far."""

    def __init__(self, group: dist.ProcessGroup, topk: dict[nn.Parameter, int]) -> None:
        self.group, self.topk = group, topk
        self.places: dict[tuple[int, ...], _Places] = {}

    def send(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Start to average a bucket of gradients; the future's value is its memory."""
        flat, gradients = bucket.buffer(), bucket.gradients()
        places = self._places(bucket)
        positions = [
            (selected_entries(torch.cat([p.detach().flatten(0, -2) for p in logits]), k) + starts).flatten()
            for k, logits, starts in places.rows
        ]
        others = [gradients[i] for i in places.others]
        parts = [*(flat.index_select(0, p) for p in positions), *(gradient.flatten() for gradient in others)]
        # By a product, in the place where DDP has it: a quotient may differ in the last bit.
        message = torch.cat(parts).mul_(1 / self.group.size())

        def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            means = future.value()[0].split([part.numel() for part in parts])
            for place, mean in zip(positions, means[: len(positions)], strict=True):
                if place.is_cuda:
                    # Made on another stream than the one that reads it here.
                    place.record_stream(torch.cuda.current_stream(place.device))
                flat.index_copy_(0, place, mean)
            for gradient, mean in zip(others, means[len(positions) :], strict=True):
                gradient.copy_(mean.view(gradient.shape))
            return flat

        return dist.all_reduce(message, group=self.group, async_op=True).get_future().then(put_back)

    def _places(self, bucket: dist.GradBucket) -> _Places:
        # DDP sorts its buckets anew after the first step.
        parameters: list[Any] = bucket.parameters()
        key = tuple(map(id, parameters))
        if key not in self.places:
            flat = bucket.buffer()
            own: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            others = []
            for i, (parameter, gradient) in enumerate(zip(parameters, bucket.gradients(), strict=True)):
                if parameter not in self.topk or not gradient.is_contiguous():
                    others.append(i)
                    continue
                h = parameter.shape[-1]
                begin = int(gradient.storage_offset() - flat.storage_offset())
                starts = torch.arange(begin, begin + gradient.numel(), h, device=flat.device)[:, None]
                own.setdefault((self.topk[parameter], h), []).append((parameter, starts))
            rows = [(k, [p for p, _ in found], torch.cat([s for _, s in found])) for (k, _), found in own.items()]
            self.places[key] = _Places(rows, others)
        return self.places[key]


def shard(model: Any, **options: Any) -> Any:
    """Shard an adapted model by FSDP2: a group for each block of the base model, and one for what is left.

    What blocks share is left for the last group, for a parameter may be in one only: VB-LoRA's bank (PEFT's layers
    register it in each block). So is VeRA's frozen pair, which FSDP keeps whole in every process. A copy of a module
    that is trained whole gets a group of its own, for all that a group trains has to be of one dtype. A frozen base in
    bfloat16 beside adapters in float32 is right as it is, without mixed precision: nothing is rounded but activations.

    Call it before the optimizer is made, and in every process, on equal values.

    Args:
        model: a PeftModel, ours or PEFT's own; changed in place.
        options: `mesh`, `reshard_after_forward`, `offload_policy`, ... of torch's `fully_shard`.
    Returns:
        The model.
    Raises:
        ValueError: `mp_policy` has a `param_dtype`, which would round the adapters in every forward pass; the base is
            quantised, other than to 4 bits by bitsandbytes; or a block trains parameters of several dtypes.
    """
    policy = options.get("mp_policy")
    if policy is not None and policy.param_dtype is not None:
        raise ValueError(
            f"`mp_policy` has param_dtype={policy.param_dtype}, which rounds the adapters in every forward pass; leave "
            "it out, and load the base model in that dtype."
        )
    for name, parameter in model.named_parameters():
        if not is_plain(parameter) and not hasattr(parameter, "quant_state"):
            raise ValueError(
                f"FSDP2 cannot split {name}, a quantised weight that is a {type(parameter).__name__}; those that "
                "bitsandbytes keeps in 4 bits it can. Load the base model so, or train it by DDP."
            )
    names = getattr(model.get_base_model(), "_no_split_modules", None) or ()
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    copies = [
        copy
        for module in model.modules()
        if hasattr(module, "original_module")
        for copy in module.modules_to_save.values()
    ]
    times = Counter(parameter for block in blocks for parameter in block.parameters())
    shared = {parameter for parameter, count in times.items() if count > 1}
    grouped: set[nn.Parameter] = set()
    for part in (*copies, *blocks, model):
        # The last group takes what the others have left.
        own = {p for p in part.parameters() if p.requires_grad and (part is model or p not in shared)} - grouped
        grouped |= own
        dtypes = {p.dtype for p in own}
        if len(dtypes) > 1:
            raise ValueError(
                f"What FSDP has to keep together of a {type(part).__name__} trains parameters of "
                f"{' and '.join(sorted(map(str, dtypes)))}, and it takes one dtype. Load the base model in float32, or "
                "train no biases or other parameters of its own beside the adapters."
            )
    for part in (*copies, *blocks):
        fully_shard(part, ignored_params=shared, **options)
    fully_shard(model, **options)
    # A call of the model, too, whose parameters have to be whole.
    register_fsdp_forward_method(model, "generate")
    return model

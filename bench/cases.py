"""The cases of each suite: what is adapted, with how much of what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from bench.floors import Shape

SUITES = ("layer", "block", "decode", "model", "load")
DIRECTIONS = {
    "layer": ("fwd", "fwd_bwd"),
    "block": ("fwd", "fwd_bwd"),
    "decode": ("fwd",),
    "model": ("step",),
    "load": ("save", "load"),
}
# Of one linear on so many threads of a CPU: evaluation, forward with gradients recorded, and backward alone.
ON_THREADS = ("fwd", "fwd_grad", "bwd")
# (in, out) of one linear.
LINEARS: dict[str, Shape] = {
    "llama2_7b_q": (4096, 4096),
    "llama2_7b_gate": (4096, 11008),
    "llama2_7b_down": (11008, 4096),
    "llama3_70b_q": (8192, 8192),
    "llama3_70b_k": (8192, 1024),
    "llama3_70b_gate": (8192, 28672),
    "llama3_70b_down": (28672, 8192),
    "tiny": (64, 96),
    "square_384": (384, 384),
    "square_1024": (1024, 1024),
}
# For rehearsals, and for the comparison on a CPU.
NOT_IN_FULL = ("tiny", "square_384", "square_1024")
# Of whole models: the fields of a LlamaConfig.
MODELS = {
    "llama2_7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"vocab_size": 32000, "tie_word_embeddings": False},
    "llama32_3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False},
}
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One thing to measure, by every provider.

    shape: a name in LINEARS or MODELS.
    M: tokens in all; `rows` sequences of M / rows where a model wants sequences. 0 for files.
    dtype: of base and activations, "bf16" or "fp32"; adapters are float32.
    method: "vblora" or "vera".
    r, h, b, k: rank, num_vectors, vector_length, topk; VeRA has the rank alone.
    threads: of a CPU; None for those that torch takes.
    """

    suite: str
    shape: str
    M: int
    dtype: str = "bf16"
    method: str = "vblora"
    r: int = 4
    h: int = 256
    b: int = 256
    k: int = 2
    rows: int = 1
    targets: tuple[str, ...] = ALL_LINEARS
    checkpointing: bool = False
    threads: int | None = None

    @property
    def name(self) -> str:
        """The shape and the sizes of the adapter, and what else sets the case apart."""
        sizes = f"r{self.r}" + (f"-h{self.h}" if self.method == "vblora" else "")
        extra = "-checkpointing" if self.checkpointing else ""
        few = "-" + "".join(target[0] for target in self.targets) if self.targets != ALL_LINEARS else ""
        threads = f"-t{self.threads}" if self.threads else ""
        return f"{self.shape}-{sizes}{few}{extra}{threads}"

    def id(self, direction: str) -> str:
        """For example layer/fwd_bwd/llama2_7b_q-r4-h256/M4096/bf16/vblora."""
        return f"{self.suite}/{direction}/{self.name}/M{self.M}/{self.dtype}/{self.method}"

    def directions(self) -> tuple[str, ...]:
        """What is measured of it."""
        return ON_THREADS if self.threads else DIRECTIONS[self.suite]

    def target_modules(self) -> list[str]:
        """The names of what is adapted, of those that there are: a layer alone is its q_proj."""
        return list(self.targets[:1] if self.suite == "layer" else self.targets)

    def adapted(self) -> list[bool]:
        """Whether each of `shapes` is adapted."""
        count = len(self.shapes()) // len(ALL_LINEARS)
        return [target in self.targets for target in ALL_LINEARS] * count or [True]

    def shapes(self) -> list[Shape]:
        """(in, out) of every linear of the layers that one forward passes through."""
        if self.suite == "layer":
            return [LINEARS[self.shape]]
        sizes = MODELS[self.shape]
        hidden, inner, layers = (sizes[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads = sizes["num_attention_heads"]
        narrow = hidden // heads * sizes.get("num_key_value_heads", heads)
        outs = {"k_proj": (hidden, narrow), "v_proj": (hidden, narrow), "down_proj": (inner, hidden)}
        outs |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        block = [outs.get(target, (hidden, hidden)) for target in ALL_LINEARS]
        return block * (1 if self.suite == "block" else layers)


def _layer() -> Iterator[Case]:
    # What says most comes first: a run may be stopped before the list ends.
    shapes = [name for name in LINEARS if name not in NOT_IN_FULL]
    for dtype in ("bf16", "fp32"):
        for M in (4096, 1, 256, 16, 16384):
            for shape in shapes:
                yield Case("layer", shape, M, dtype)
                yield Case("layer", shape, M, dtype, method="vera", r=256)
        for M in (4096, 1, 256, 16, 16384):
            for shape in shapes:
                yield Case("layer", shape, M, dtype, h=2048)
                yield Case("layer", shape, M, dtype, method="vera", r=1024)


def _block() -> Iterator[Case]:
    for M in (4096, 256, 16384):
        case = Case("block", "llama2_7b", M)
        yield from (case, replace(case, h=2048), replace(case, method="vera", r=256))


def _decode() -> Iterator[Case]:
    for M in (1, 16):
        case = Case("decode", "llama2_7b", M, h=2048)
        yield from (case, replace(case, method="vera", r=256))


def _model() -> Iterator[Case]:
    # PEFT's own comparison, and then a 7B.
    few = ("q_proj", "v_proj")
    peft = Case("model", "llama32_3b", 4 * 768, rows=4, targets=few)
    yield from (peft, replace(peft, method="vera", r=256))
    large = Case("model", "llama2_7b", 4096, h=2048, rows=2)
    for checkpointing in (True, False):
        yield replace(large, checkpointing=checkpointing)
        yield replace(large, checkpointing=checkpointing, method="vera", r=256)


def _load() -> Iterator[Case]:
    case = Case("load", "llama2_7b", 0)
    yield from (case, replace(case, method="vera", r=256))


FULL = {"layer": _layer, "block": _block, "decode": _decode, "model": _model, "load": _load}


def full(suite: str) -> list[Case]:
    """Every case of a suite."""
    return list(FULL[suite]())


def quick(suite: str) -> list[Case]:
    """The few cases of a suite that say most; all suites together take under two minutes on a GPU."""
    if suite == "layer":
        case = Case("layer", "llama2_7b_q", 4096)
        return [case, replace(case, M=1), replace(case, method="vera", r=256)]
    if suite == "block":
        return [Case("block", "llama2_7b", 4096), Case("block", "llama2_7b", 256)]
    # Whole models take too long to make.
    return []


def tiny(suite: str) -> list[Case]:
    """The suite's shapes made so small that an interpreter on a CPU gets through them."""
    case = Case(suite, "tiny", {"load": 0, "decode": 1}.get(suite, 12), "fp32", h=12, b=16)
    if suite == "model":
        case = replace(case, rows=2, targets=("q_proj", "v_proj"))
    vera = replace(case, method="vera", r=8)
    return [case, vera] + ([replace(case, dtype="bf16")] if suite == "layer" else [])


def on_cpu(suite: str) -> list[Case]:
    """What a CPU compares: linears, a small Llama, and its files; all in float32.

    A linear of 1024 x 1024 at 512 tokens, and two of few and many tokens on one thread and on two.
    """
    if suite == "layer":
        case = Case("layer", "square_1024", 512, "fp32")
        found = [case, replace(case, h=2048), replace(case, method="vera", r=256)]
        for threads, (shape, b), M in product((1, 2), (("square_384", 64), ("square_1024", 256)), (16, 384, 2048)):
            case = Case("layer", shape, M, "fp32", b=b, threads=threads)
            found += [case, replace(case, method="vera", r=256)]
        return found
    if suite in ("model", "load"):
        case = Case(suite, "small", 256 if suite == "model" else 0, "fp32", b=64, rows=2)
        return [case, replace(case, method="vera", r=256)]
    return []

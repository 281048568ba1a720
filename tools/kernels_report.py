"""Compile the kernels ahead of time for every chip and print what they use: `make kernels-report`; needs no GPU."""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bench.cases import LINEARS
from tools.aot import SHARED_LIMIT, TARGETS, compiling
from vblora_triton.kernels import tuning
from vblora_triton.ops import triton_together, triton_vblora, triton_vera

# (in, out) of the linears that ship: Llama-2-7B's, and of Llama-3-70B those of other shapes.
SHAPES = {name: shape for name, shape in LINEARS.items() if name.startswith("llama")}
TOKENS = (1, 256, 4096, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Passes(NamedTuple):
    """Both passes of one adapted linear on meta tensors.

    given: what the passes are given beside a base, x first. forward: given the base's result, or None where its product
    is added afterwards; what `backward` wants of it, y first. backward: given that, and the dx of other layers that
    read the same x, if there are some; VB-LoRA's may get the base's product to begin with, as `overlap` gives it, in
    the place of base, and last. project: how forward begins, once for all layers that read the same x.
    """

    given: tuple[torch.Tensor, ...]
    forward: Callable[[torch.Tensor | None], tuple[torch.Tensor, ...]]
    backward: Callable[..., list[torch.Tensor]]
    project: Callable[[], Any] = lambda: None


def vblora_passes(
    K: int, N: int, M: int, h: int, dtype: torch.dtype, *, r: int = 4, b: int = 256, k: int = 2, p: float = 0.0
) -> Passes:
    """Forward and backward of one linear adapted by VB-LoRA."""
    meta = {"device": "meta"}
    x = torch.empty(M, K, dtype=dtype, **meta)
    logits_A, logits_B = torch.empty(r, K // b, h, **meta), torch.empty(N // b, r, h, **meta)
    bank = torch.empty(h, b, **meta)
    seed = torch.empty(1, dtype=torch.int64, **meta) if p else None
    linear = triton_vblora.linear

    def backward(found: tuple[torch.Tensor, ...], *more: Any) -> list[torch.Tensor]:
        dy, *saved = found
        return linear.bwd.unobserved(dy, x, *saved, bank, seed, p, logits_A.dtype, logits_B.dtype, [True] * 4, *more)

    return Passes(
        (x, logits_A, logits_B, bank),
        lambda base: linear.fwd.unobserved(x, base, logits_A, logits_B, bank, k, p, seed),
        backward,
    )


class _Context(SimpleNamespace):
    """What torch.autograd gives a Function, as far as `Together` wants it."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, _: bool) -> None:
        pass


def vblora_together_passes(
    K: int, N: int, M: int, h: int, dtype: torch.dtype, *, count: int, r: int = 4, b: int = 256, k: int = 2
) -> Passes:
    """Forward and backward of `count` such linears that read one x, as one node; what is kept begins with their y."""
    meta = {"device": "meta"}
    x, bank = torch.empty(M, K, dtype=dtype, **meta), torch.empty(h, b, **meta)
    weight, logits_A = torch.empty(N, K, dtype=dtype, **meta), torch.empty(r, K // b, h, **meta)
    layers = [(weight, None, logits_A, torch.empty(N // b, r, h, **meta))] * count

    context = _Context()
    context.needs_input_grad = [True, True, False, *[False, False, True, True] * count]

    def forward(_: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        *ys, _ = triton_together.Together.forward(context, x, bank, k, *(t for own in layers for t in own))
        return *ys, *context.saved_tensors

    def backward(found: tuple[torch.Tensor, ...], dx: torch.Tensor | None = None, *_: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            grads = triton_together.Together.backward(context, *found[:count], dx)
        return [grad for grad in grads if grad is not None]

    return Passes((x, bank, *(t for own in layers for t in own[2:])), forward, backward)


def vera_passes(K: int, N: int, M: int, dtype: torch.dtype, *, r: int = 256, p: float = 0.0) -> Passes:
    """Forward and backward of one linear adapted by VeRA."""
    meta = {"device": "meta"}
    x = torch.empty(M, K, dtype=dtype, **meta)
    _, _, A, _ = frozen = tuple(torch.empty(shape, **meta) for shape in ((N,), (r,), (r, K), (N, r)))
    seed = torch.empty(1, dtype=torch.int64, **meta) if p else None
    linear = triton_vera.linear

    def project() -> tuple[torch.Tensor, ...]:
        return triton_vera.project.unobserved(x, A, dtype == torch.float32, p, seed)

    def forward(base: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        projected = project()
        return *linear.fwd.unobserved(x, base, *frozen, *projected, p, seed), *projected

    def backward(found: tuple[torch.Tensor, ...], *dx: torch.Tensor) -> list[torch.Tensor]:
        dy, *projected = found
        return linear.bwd.unobserved(dy, *frozen, *projected, seed, p, list(x.shape), dtype, [True] * 3, *dx)

    return Passes((x, *frozen), forward, backward, project)


def bases(M: int, N: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """What stands in the place of the base's result: it or, where its product is added later, a bias or nothing."""
    meta = {"device": "meta"}
    return [torch.empty(M, N, dtype=dtype, **meta), torch.empty(N, dtype=dtype, **meta).expand(M, N), None]


def launch_all(K: int, N: int, M: int, h: int, dtype: torch.dtype, *, k: int = 2, p: float = 0.0, **sizes: int):
    """Forward and backward of one adapted linear, and a composition, on meta tensors: every launch that ships."""
    passes = vblora_passes(K, N, M, h, dtype, k=k, p=p, **sizes)
    x, logits_A, _, bank = passes.given
    first: list[Any] = []
    if M <= tuning.FIRST_ROWS:
        first = [(lambda: torch.empty(M, N, device="meta"), bias) for bias in (None, x.new_empty(N))]
    for base in (*first, *bases(M, N, dtype)):
        found = passes.forward(base)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    triton_vblora.linear_selected.fwd.unobserved(x, None, *found[2:], bank, p, seed)
    passes.backward(found)
    passes.backward(found, torch.empty_like(x))
    if first:
        passes.backward(found, None, lambda: torch.empty(M, K, device="meta"))
    triton_vblora.compose.fwd.unobserved(logits_A, bank, k)
    if not p and M > tuning.FEW_ROWS:
        # Gate and up; q, k and v. Two in other settings take the tiles of one layer of twice the rank.
        for count in (2, 3) if k == 2 and dtype == torch.bfloat16 else (3,):
            if count * sizes.get("r", 4) <= triton_together.MAX_RANKS:
                together = vblora_together_passes(K, N, M, h, dtype, count=count, k=k, **sizes)
                found = together.forward(None)
                together.backward(found)
                together.backward(found, torch.empty_like(x))


def launch_all_vera(K: int, N: int, M: int, dtype: torch.dtype, **sizes: Any):
    """Forward and backward of one linear adapted by VeRA, on meta tensors: every launch that ships."""
    passes = vera_passes(K, N, M, dtype, **sizes)
    for base in bases(M, N, dtype):
        found = passes.forward(base)
    passes.backward(found)
    passes.backward(found, torch.empty_like(passes.given[0]))


# Sizes that are 1, where triton specialises the argument away, and sizes that divide nothing.
ODD = (
    {"shape": "ones", "K": 8, "N": 8, "M": 1, "h": 1, "b": 8, "r": 1, "k": 1, "dtype": "bf16"},
    {"shape": "odd", "K": 96, "N": 144, "M": 17, "h": 60, "b": 48, "r": 5, "k": 3, "dtype": "fp32"},
    {"shape": "odd", "K": 96, "N": 144, "M": 130, "h": 5000, "b": 48, "r": 3, "k": 20, "dtype": "fp16"},
)


def cases(names: list[str]) -> Iterator[dict]:
    """Of each shape every class of M at both sizes of bank; of the first one also the other dtypes, r and dropout."""
    yield from ODD
    for name in names:
        K, N = SHAPES[name]
        for M in TOKENS:
            for h in (256, 2048):
                yield {"shape": name, "K": K, "N": N, "M": M, "h": h, "dtype": "bf16"}
    yield {"method": "vera", "shape": "odd", "K": 97, "N": 143, "M": 131, "r": 20, "dtype": "bf16"}
    for name in names:
        K, N = SHAPES[name]
        for M in TOKENS:
            yield {"method": "vera", "shape": name, "K": K, "N": N, "M": M, "dtype": "bf16"}
    K, N = SHAPES[names[0]]
    for change in ({"dtype": "fp16"}, {"dtype": "fp32"}, {"p": 0.1}, {"r": 1024}, {"r": 16}):
        yield {"method": "vera", "shape": names[0], "K": K, "N": N, "M": 4096, "dtype": "bf16"} | change
    for change in (
        {"dtype": "fp16"},
        {"dtype": "fp32"},
        {"r": 8},
        {"r": 16},
        {"r": 64},
        {"r": 64, "M": 256},
        {"p": 0.1},
        {"b": 64, "k": 4},
    ):
        yield {"shape": names[0], "K": K, "N": N, "M": 4096, "h": 256, "dtype": "bf16"} | change


def activation_offsets(ttir: str, dtype: str, bits: int) -> int:
    """Count the tensors of pointers to 16-bit elements, which only activations have, that offsets of `bits` make."""
    pointer = {"bf16": "bf16", "fp16": "f16"}.get(dtype)
    # `%p = tt.addptr %base, %offset : tensor<64x128x!tt.ptr<bf16>>, tensor<64x128xi32>`
    return len(re.findall(rf"tt\.addptr .*!tt\.ptr<{pointer}>>, tensor<[\dx]*xi{bits}>", ttir)) if pointer else 0


# Of PTX: loads and stores of 16 bytes a thread, loads of two, and those of the matrix unit, Hopper's and before.
INSTRUCTIONS = {
    "wide_loads": r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global [^;]* 0x10,",
    "narrow_loads": r"ld\.global\.[bu]16",
    "wide_stores": r"st\.global\.v4\.b32",
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
}


def report(targets: list[str], names: list[str]) -> list[dict]:
    """One row for each kernel, chip and distinct set of compile-time choices."""
    rows: list[dict] = []
    seen: set[int] = set()
    for target in targets:
        for case in cases(names):
            arguments = {key: value for key, value in case.items() if key not in ("method", "shape", "dtype")}
            launch = launch_all_vera if case.get("method") == "vera" else launch_all
            with compiling(target) as compiled:
                launch(**arguments, dtype=DTYPES[case["dtype"]])
            for kernel in compiled:
                # Equal choices give the very same object.
                if id(kernel) in seen:
                    continue
                seen.add(id(kernel))
                row = {"kernel": kernel.kernel, "target": target, **case}
                row |= {"registers": kernel.registers, "shared": kernel.shared, "spills": kernel.spills}
                row |= {"shared_limit": SHARED_LIMIT[target]}
                row |= {
                    key: value
                    for key, value in kernel.arguments.items()
                    if key.startswith("BLOCK") or key == "num_warps"
                }
                row |= {name: kernel.arguments.get(f"{name}_ptr") is not None for name in ("Base", "Bias")}
                for bits in (32, 64):
                    row[f"offsets_{bits}"] = activation_offsets(kernel.ttir, case["dtype"], bits)
                if kernel.ptx:
                    row |= {name: len(re.findall(pattern, kernel.ptx)) for name, pattern in INSTRUCTIONS.items()}
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.kernels_report", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args()
    rows = report(options.targets, options.shapes)
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'kernel':26} {'chip':7} {'case':50} {'tiles':42} {'regs':>4} {'shared':>7} {'spills':>6}")
    for row in rows:
        extra = "".join(f" {key}{row[key]}" for key in ("r", "p", "b", "k") if key in row)
        bank = f" h{row['h']}" if "h" in row else ""
        case = f"{row.get('method', 'vblora')} {row['shape']} M{row['M']}{bank} {row['dtype']}{extra}"
        tiles = " ".join(f"{key.removeprefix('BLOCK_')}{row[key]}" for key in row if key.startswith("BLOCK"))
        print(
            f"{row['kernel'].strip('_'):26} {row['target']:7} {case:50} {tiles:42} "
            f"{row['registers']:4} {row['shared']:7} {row['spills']:6}"
        )


if __name__ == "__main__":
    main()

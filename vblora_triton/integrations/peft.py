"""PEFT's own VB-LoRA and VeRA layers, computed by `vblora_triton.ops`: one call in, one call back.

Our functions look at each call which patch is in force: the newest of the layer alone, else the newest of all of PEFT,
else none, and PEFT's own `forward` runs. So whoever keeps one of them, as hooks and wrappers do, may go on calling it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from vblora_triton import ops
from vblora_triton.integrations import topk_refusal
from vblora_triton.ops.dispatch import check_backend
from vblora_triton.ops.reference import frozen_product
from vblora_triton.tuner.linear import frozen_linear, held

# The sources that the functions below stand for, by `_digest`: those of these versions of peft, all that are between.
KNOWN_PEFT = "0.19.0 to 0.21.2"
_VBLORA_DIGESTS = {
    "forward": {"4ed474b9506b4ae1"},
    "_get_lora_matrices": {"357510e3043b7675"},
    "_get_low_rank_matrix": {"bd50355dd0fee2a9"},
}
# The first is 0.19's, which does not round to the dtype of the base layer's result before that of x.
_VERA_DIGESTS = {"forward": {"5218c0e031287eda", "96967b7f1e065ce3"}}


class _Patch:
    """What one call of patch_peft asked for."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


# The patches of all of PEFT that are not taken back yet, oldest first.
_of_all: list[_Patch] = []
# Each function of ours that somebody still holds, with the patches that it looks at, of which the last one counts.
# A class has one function for good. A layer that is patched alone has one of its own, which its copies share.
_functions: WeakKeyDictionary[Callable[..., Any], list[_Patch]] = WeakKeyDictionary()
_of_class: dict[Any, Any] = {}
_of_layer: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()
_lock = threading.RLock()

_Base = Tensor | ops.FrozenLinear


def patch_peft(model: nn.Module | None = None, *, backend: str = "auto") -> AbstractContextManager[Any]:
    """Let PEFT's VB-LoRA and VeRA layers run this package's ops; everything else stays PEFT's.

    Of a layer, `forward` is replaced, and nothing more: parameters, files, merging, `state_dict`, configurations and
    result dtypes are PEFT's. The base layer is called as before. Calling it again changes nothing, and one
    `unpatch_peft()` takes back any number of calls. Used as a context manager, it takes back this call on leaving: the
    newest call that is left counts, also where contexts overlap, as those of several threads do. What somebody else
    put in the place of a `forward` since stays there, and runs PEFT's own once no call is left. Graphs that
    torch.compile made before do not see the change: patch first, or call `torch.compiler.reset()`.

    PEFT refuses to train an adapter that was loaded from a file with top-k weights only, and looks at the values in
    every layer and step, which waits for the GPU. That refusal stays, and looks once at each parameter, and again when
    something other than an optimizer has written to it; a write through `.data` is not seen. torch.compile, which
    leaves its graph for PEFT's looks, looks when it compiles, and an optimizer before it steps what was written to
    since.

    Two things differ. Where logits tie, as they often do in bfloat16, the first of them are the top k; PEFT may take
    others. And gradients of gradients (`create_graph=True`) need backend="reference"; the others raise an error.

    Args:
        model: whose layers to patch; layers that are added to it later are not, copies that are made of it are. None
            for all layers, built already or still to come, also those that carry hooks of accelerate.
        backend: "auto", "triton" or "reference"; see `use_backend`.
    Returns:
        A context manager.
    Raises:
        ImportError: peft is not installed.
        TypeError: `model` is no module; or the installed peft, or a layer of `model`, computes in a way that is not
            known here. Nothing is changed then.
        ValueError: `model` has no VB-LoRA and no VeRA layer of PEFT, or the backend is unknown.
    """
    check_backend(backend)
    kinds = _layer_kinds()
    patch, undo = _Patch(backend), ExitStack()
    with _lock:
        if model is None:
            for kind in kinds:
                kind.check()
            for kind in kinds:
                _patch_class(kind)
            _of_all.append(patch)
        else:
            for layer, kind in _checked_layers(model, kinds):
                _patch_layer(layer, kind, patch)
    undo.callback(_leave, patch)
    return undo


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Give PEFT's layers their own `forward` back, however often `patch_peft` was called.

    Args:
        model: the model whose layers `patch_peft(model)` patched. None for everything: all classes, and all models.
    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is given, but PEFT is patched as a whole; call `unpatch_peft()`.
    """
    layers = [] if model is None else _modules(model)
    if model is not None and is_patched():
        raise ValueError("`model` cannot be given back alone: patch_peft() patched all of PEFT; call unpatch_peft().")
    with _lock:
        for layer in layers:
            _give_back(layer)
        if model is None:
            for patches in _functions.values():
                patches.clear()
        _tidy()


def is_patched(model: nn.Module | None = None) -> bool:
    """Say whether PEFT's layers run this package's ops.

    Args:
        model: whether all its VB-LoRA and VeRA layers of PEFT do, and there are some. None for PEFT as a whole.
    Raises:
        TypeError: `model` is no module.
    """
    if model is None:
        return bool(_of_all) and all(vars(cls)["forward"] is function for cls, function in _of_class.items())
    # What was never patched need not be imported to be told apart.
    layers = _peft_layers(model, _layer_kinds() if _functions else [])
    return bool(layers) and all(kind.composes_for(type(layer)) and _runs_ours(layer) for layer, kind in layers)


def _function(kind: _LayerKind, patches: list[_Patch], original: Callable[..., Any] | None = None) -> Any:
    """Return what takes the place of `forward`, which without a patch runs the original, or what the class does."""

    @functools.wraps(kind.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A copy of the last one: another thread may be about to take it back.
        for patch in patches[-1:]:
            if kind.composes_for(type(self)):
                return _forward(kind, self, x, args, kwargs, patch.backend)
        return (original or type(self).forward)(self, x, *args, **kwargs)

    _functions[forward] = patches
    return forward


def _patches(function: Any) -> list[_Patch] | None:
    """The patches that a function of ours looks at; None for any other."""
    return _functions.get(function) if isinstance(function, FunctionType) else None


def _place(layer: nn.Module) -> str:
    """Where a layer keeps what computes it: below the hooks of accelerate if it carries some."""
    return "_old_forward" if "_old_forward" in vars(layer) else "forward"


def _forward_of(layer: nn.Module) -> Any:
    own = vars(layer).get(_place(layer))
    return type(layer).forward if own is None else getattr(own, "__func__", own)


def _runs_ours(layer: nn.Module) -> bool:
    patches = _patches(_forward_of(layer))
    return patches is not None and bool(patches or _patches(type(layer).forward))


def _patch_class(kind: _LayerKind) -> None:
    function = _of_class.setdefault(kind.cls, _function(kind, _of_all, kind.forward))
    if kind.cls.forward is not function:
        kind.cls.forward = function
        # Hooks of accelerate keep the method that they found, and leave it on the layer when they are removed.
        for method in gc.get_referrers(kind.forward):
            layer = getattr(method, "__self__", None)
            if isinstance(layer, nn.Module) and vars(layer).get(_place(layer)) is method:
                vars(layer)[_place(layer)] = MethodType(function, layer)


def _patch_layer(layer: nn.Module, kind: _LayerKind, patch: _Patch) -> None:
    earlier = _patches(_forward_of(layer))
    function = _function(kind, [patch] if earlier is None or earlier is _of_all else [*earlier, patch])
    vars(layer)[_place(layer)] = MethodType(function, layer)
    _of_layer[layer] = function


def _leave(patch: _Patch) -> None:
    with _lock:
        for patches in _functions.values():
            if patch in patches:
                patches.remove(patch)
        _tidy()


def _give_back(layer: nn.Module) -> None:
    """Let a layer run what its class does, whatever was asked for it alone."""
    place, function = _place(layer), _of_layer.pop(layer, None)
    if _patches(_forward_of(layer)) is not None:
        vars(layer).pop(place, None)
        if place == "_old_forward":
            vars(layer)[place] = MethodType(type(layer).forward, layer)
    if function is not None and _forward_of(layer) is not type(layer).forward:
        # It is below a wrapper of somebody's. Else it is left as it is, for the copies of this layer.
        _functions[function].clear()


def _tidy() -> None:
    """Leave nothing behind that is not in use."""
    for layer, function in list(_of_layer.items()):
        if not _functions[function]:
            _give_back(layer)
    if not _of_all:
        for cls, function in _of_class.items():
            if vars(cls)["forward"] is function:
                cls.forward = function.__wrapped__
    if not any(_functions.values()):
        topk_refusal.forget()


def _modules(model: Any) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a torch module, or nothing for all of PEFT.")
    return list(model.modules())


def _peft_layers(model: nn.Module, kinds: list[_LayerKind]) -> list[tuple[nn.Module, _LayerKind]]:
    return [(module, kind) for module in _modules(model) for kind in kinds if isinstance(module, kind.base)]


def _checked_layers(model: nn.Module, kinds: list[_LayerKind]) -> list[tuple[nn.Module, _LayerKind]]:
    found = _peft_layers(model, kinds)
    for layer, kind in found:
        cls, function = type(layer), _forward_of(layer)
        known = kind.composes_for(cls) and cls.forward is kind.cls.forward
        if not known or (function is not kind.forward and _patches(function) is None):
            name = next(name for name, module in model.named_modules() if module is layer)
            what = ", whose `forward` somebody replaced" if known else ""
            raise TypeError(
                f"{name or 'the model'} is a {cls.__module__}.{cls.__qualname__}{what}, which patch_peft "
                "does not know how to compute; nothing was changed. Leave this model as it is, or call patch_peft(), "
                "which leaves such layers to PEFT."
            )
        kind.check()
    if not found:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no VB-LoRA and no VeRA layer of PEFT; add the adapter first, "
            "or call patch_peft() for all layers to come. Models made by vblora_triton run its ops already."
        )
    return found


class _LayerKind:
    """One of PEFT's layers: its class, the class that all layers of its method share, and how to compute it."""

    def __init__(self, cls: Any, base: type, adapters: str, digests: dict[str, set[str]], add_update: Any) -> None:
        self.cls, self.base, self.adapters, self.add_update = cls, base, adapters, add_update
        self.digests = digests
        current = vars(cls)["forward"]
        # PEFT's own, also while the class has ours.
        self.forward = current if _patches(current) is None else current.__wrapped__
        self.parts = {name: vars(cls).get(name) for name in digests if name != "forward"}

    def composes_for(self, cls: type) -> bool:
        """Say whether a subclass inherits what composes the update; somebody's own kind of layer may not."""
        return all(getattr(cls, name, None) is part for name, part in self.parts.items())

    def check(self) -> None:
        """Refuse with a TypeError unless PEFT computes this layer in a way that is known here."""
        for name, function in {"forward": self.forward, **self.parts}.items():
            if _digest(function) not in self.digests[name]:
                raise TypeError(
                    f"{self.cls.__module__}.{self.cls.__qualname__}.{name} of peft {import_module('peft').__version__} "
                    f"is not one that patch_peft knows, those of peft {KNOWN_PEFT}; somebody replaced it, or the "
                    "version is another. Nothing was changed: use one of these versions, or PEFT's layers as they are."
                )


def _layer_kinds() -> list[_LayerKind]:
    try:
        vblora, vera = (import_module(f"peft.tuners.{method}.layer") for method in ("vblora", "vera"))
    except ImportError as error:
        raise ImportError("patch_peft() needs peft >= 0.19: pip install 'vblora-triton[peft]'.") from error
    return [
        _LayerKind(vblora.Linear, vblora.VBLoRALayer, "vblora_logits_A", _VBLORA_DIGESTS, _add_vblora),
        _LayerKind(vera.Linear, vera.VeraLayer, "vera_lambda_d", _VERA_DIGESTS, _add_vera),
    ]


def _digest(function: Any) -> str | None:
    """A hash of a function's source without blanks and comments, the same for every version of Python."""
    try:
        # Of the function itself: what somebody put around it by functools.wraps shows the source of what it wraps.
        lines = inspect.getsource(getattr(function, "__code__", function)).splitlines()
    except (OSError, TypeError):
        return None
    code = "".join("".join(line.split()) for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _forward(kind: _LayerKind, layer: Any, x: Tensor, args: Any, kwargs: Any, backend: str) -> Tensor:
    """What PEFT's two layers do around the updates of their adapters."""
    merged = layer.merged
    if layer.disable_adapters and merged:
        layer.unmerge()
    adapters = [] if layer.disable_adapters or merged else layer.active_adapters
    # nn.Module's attributes are found by a longer way, which few rows notice.
    own, base_layer = layer._modules[kind.adapters], layer._modules["base_layer"]
    adapters = [adapter for adapter in adapters if adapter in own]
    base = frozen_linear(base_layer, x) if adapters and not (args or kwargs) else None
    result: Any = base_layer(x, *args, **kwargs) if base is None else base
    for adapter in adapters:
        result = kind.add_update(layer, adapter, x, result, backend)
    return result if result.dtype == x.dtype else result.to(x.dtype)


def _add_vblora(layer: Any, adapter: str, x: Tensor, base: _Base, backend: str) -> Tensor:
    own = layer._modules
    logits_A, logits_B = held(own["vblora_logits_A"], adapter), held(own["vblora_logits_B"], adapter)
    if layer.training:
        topk_refusal.refuse(layer, adapter)
    # Of a model that is spread over devices, the one bank is elsewhere for some layers.
    bank = layer.vblora_vector_bank[adapter]
    bank = bank if bank.device == logits_A.device else bank.to(logits_A.device)
    x, base, dropout = _dropped(own["vblora_dropout"][adapter], x, base)
    return ops.vblora_linear(x, base, logits_A, logits_B, bank, layer.topk[adapter], backend=backend, **dropout)


def _add_vera(layer: Any, adapter: str, x: Tensor, base: _Base, backend: str) -> Tensor:
    lambda_b, lambda_d = layer.vera_lambda_b[adapter], layer.vera_lambda_d[adapter]
    A, B = layer.vera_A[adapter], layer.vera_B[adapter]
    if A.device != x.device or B.device != x.device:
        A, B = A[:, : layer.in_features].to(x.device), B[: layer.out_features].to(x.device)
    if lambda_d.shape[0] != A.shape[0]:
        # A second adapter of rank 1 takes the first one's projections in PEFT, and is spread over their ranks.
        lambda_d = lambda_d.expand(A.shape[0])
    x, base, dropout = _dropped(layer.vera_dropout[adapter], x, base)
    return ops.vera_linear(x, base, lambda_b, lambda_d, A, B, backend=backend, **dropout)


def _dropped(dropout: nn.Module, x: Tensor, base: _Base) -> tuple[Tensor, _Base, dict[str, Any]]:
    """The input, the base and the options of an op, which drops what torch's own layer would; others do it themselves.

    The base layer reads the input as it was.
    """
    if type(dropout) is nn.Dropout:
        return x, base, {"dropout_p": dropout.p, "training": dropout.training}
    after = dropout(x)
    if after is not x and isinstance(base, ops.FrozenLinear):
        base = frozen_product(x, base)
    return after, base, {}

"""PEFT's own VB-LoRA and VeRA layers, computed by `vblora_triton.ops`: one call in, one call back."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from vblora_triton.integrations.peft_layers import LayerKind, layer_kinds, topk_refusal
from vblora_triton.ops.dispatch import check_backend

# What takes the place of a layer's `forward`: for a class, or for single layers, so that taking back the one leaves
# the other. The keys are (class, what for, backend); the same arguments give the same function.
_CLASS, _LAYER = "class", "layer"
_made: dict[tuple[type, str, str], Callable[..., Any]] = {}
_originals: dict[type, Callable[..., Any]] = {}
# The patches that are not taken back yet, oldest first: for each call of patch_peft the function that it asked for.
# The last one is run, in whichever order the calls are taken back. There is an entry only while it holds one.
_class_patches: dict[type, dict[object, Callable[..., Any]]] = {}
_layer_patches: WeakKeyDictionary[nn.Module, dict[object, Callable[..., Any]]] = WeakKeyDictionary()
# Layers given back below a wrapper of somebody's, which still calls our function.
_given_back: WeakSet[nn.Module] = WeakSet()
_lock = threading.RLock()


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
    something other than an optimizer has written to it; a write through `.data` is not seen. In training torch.compile
    leaves its graph for that look, as it does for PEFT's.

    Two things differ. Where logits tie, as they often do in bfloat16, the first of them are the top k; PEFT may take
    others. And gradients of gradients (`create_graph=True`) need backend="reference"; the others refuse with an
    error.

    Args:
        model: whose layers to patch; layers that are added to it later are not. None for all layers, built already or
            still to come, also those that carry hooks of accelerate.
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
    kinds = layer_kinds()
    token, undo = object(), ExitStack()
    with _lock:
        if model is None:
            for kind in kinds:
                kind.check(_original(kind))
            for kind in kinds:
                _originals[kind.cls] = _original(kind)
                _class_patches.setdefault(kind.cls, {})[token] = _function(kind, _CLASS, backend)
            _replace_in_classes({kind.cls: _class_patches[kind.cls][token] for kind in kinds})
            undo.callback(_leave_classes, token)
            return undo
        layers = _checked_layers(model, kinds)
        for layer, kind in layers:
            _originals[kind.cls] = _original(kind)
            _patch_layer(layer, _function(kind, _LAYER, backend), token)
    undo.callback(_leave_layers, [layer for layer, _ in layers], token)
    return undo


def unpatch_peft(model: nn.Module | None = None) -> None:
    """Give PEFT's layers their own `forward` back, however often `patch_peft` was called.

    Args:
        model: the model whose layers `patch_peft(model)` patched. None for everything: all classes, and all models.
    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is given, but PEFT is patched as a whole; call `unpatch_peft()`.
    """
    if model is None:
        with _lock:
            _class_patches.clear()
            _settle_classes(_originals)
            layers = {*_layer_patches, *(layer for layer, _ in _holders(*_made.values()))}
            _layer_patches.clear()
            for layer in layers:
                _settle(layer)
        topk_refusal.forget()
        return
    _check_module(model)
    if is_patched():
        raise ValueError("`model` cannot be given back alone: patch_peft() patched all of PEFT; call unpatch_peft().")
    with _lock:
        for layer in model.modules():
            if _layer_patches.pop(layer, None) or _runs_ours(layer):
                _settle(layer)
                topk_refusal.forget(layer)


def is_patched(model: nn.Module | None = None) -> bool:
    """Say whether PEFT's layers run this package's ops.

    Args:
        model: whether all its VB-LoRA and VeRA layers of PEFT do, and there are some. None for PEFT as a whole.
    Raises:
        TypeError: `model` is no module.
    """
    if model is None:
        classes = [cls for cls, scope, _ in _made if scope == _CLASS]
        return bool(classes) and all(cls in _class_patches and _is_ours(vars(cls)["forward"]) for cls in classes)
    _check_module(model)
    # What was never patched need not be imported to be told apart.
    if not _originals:
        return False
    layers = [layer for layer, _ in _peft_layers(model, layer_kinds())]
    return bool(layers) and all(map(_runs_ours, layers))


def _original(kind: LayerKind) -> Callable[..., Any]:
    """PEFT's own `forward`, also while the class has ours."""
    current = vars(kind.cls)["forward"]
    return _originals[kind.cls] if _is_ours(current) else current


def _function(kind: LayerKind, scope: str, backend: str) -> Callable[..., Any]:
    key = (kind.cls, scope, backend)
    if key not in _made:
        original = _originals[kind.cls]
        ours = kind.make_forward(kind.cls, original, backend)
        _made[key] = (_while_class_is_patched if scope == _CLASS else _while_layer_is_patched)(kind.cls, ours, original)
    return _made[key]


# Somebody's wrapper may call our functions when they are taken back long since: they are PEFT's then.
def _while_class_is_patched(cls: type, ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (ours if cls in _class_patches else original)(self, *args, **kwargs)

    return forward


def _while_layer_is_patched(cls: type, ours: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (type(self).forward if self in _given_back else ours)(self, *args, **kwargs)

    return forward


def _is_ours(function: Any) -> bool:
    return any(function is made for made in _made.values())


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is a {type(model).__name__}; give a torch module, or nothing for all of PEFT.")


def _peft_layers(model: nn.Module, kinds: list[LayerKind]) -> Iterator[tuple[nn.Module, LayerKind | None]]:
    """The layers of both methods in the model; None with those of a class that only PEFT knows how to compute."""
    for module in model.modules():
        for kind in kinds:
            if isinstance(module, kind.base):
                yield module, kind if kind.computes_like(type(module)) else None


def _checked_layers(model: nn.Module, kinds: list[LayerKind]) -> list[tuple[nn.Module, LayerKind]]:
    _check_module(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for layer, kind in _peft_layers(model, kinds):
        cls, function = type(layer), _forward_of(layer)
        if kind is None or not (function is _original(kind) or _is_ours(function)):
            what = "" if kind is None else ", whose `forward` somebody replaced"
            raise TypeError(
                f"{names[id(layer)] or 'the model'} is a {cls.__module__}.{cls.__qualname__}{what}, which patch_peft "
                "does not know how to compute; nothing was changed. Leave this model as it is, or call patch_peft(), "
                "which leaves such layers to PEFT."
            )
        kind.check(_original(kind))
        found.append((layer, kind))
    if not found:
        raise ValueError(
            f"`model`, a {type(model).__name__}, has no VB-LoRA and no VeRA layer of PEFT; add the adapter first, "
            "or call patch_peft() for all layers to come. Models made by vblora_triton run its ops already."
        )
    return found


def _forward_of(layer: nn.Module) -> Any:
    """The function that computes the layer, below the hooks of accelerate if it carries some."""
    own = vars(layer).get("_old_forward", vars(layer).get("forward"))
    return type(layer).forward if own is None else getattr(own, "__func__", own)


def _runs_ours(layer: nn.Module) -> bool:
    function = _forward_of(layer)
    for (cls, scope, _), made in _made.items():
        if function is made:
            return cls in _class_patches if scope == _CLASS else layer not in _given_back
    return False


def _leave_classes(token: object) -> None:
    with _lock:
        left = [cls for cls, patches in _class_patches.items() if patches.pop(token, None)]
        for cls in left:
            if not _class_patches[cls]:
                del _class_patches[cls]
        _settle_classes(left)


def _leave_layers(layers: list[nn.Module], token: object) -> None:
    with _lock:
        for layer in layers:
            patches = _layer_patches.get(layer, {})
            if patches.pop(token, None):
                if not patches:
                    del _layer_patches[layer]
                _settle(layer)


def _settle_classes(classes: Iterable[type]) -> None:
    """Let the classes that run ours run the newest patch that is left, or PEFT's own."""
    _replace_in_classes(
        {
            cls: [_originals[cls], *_class_patches.get(cls, {}).values()][-1]
            for cls in classes
            if _is_ours(vars(cls)["forward"])
        }
    )


def _replace_in_classes(functions: dict[Any, Callable[..., Any]]) -> None:
    """Let each class run its function, also those of its layers that keep the present one as a method of their own."""
    replaced = {}
    for cls, function in functions.items():
        if vars(cls)["forward"] is not function:
            replaced[vars(cls)["forward"]] = function
            cls.forward = function
    # Hooks of accelerate keep the method that they found, and leave it on the layer when they are removed.
    for layer, current in _holders(*replaced):
        for name in ("_old_forward", "forward"):
            if getattr(vars(layer).get(name), "__func__", None) is current:
                vars(layer)[name] = MethodType(replaced[current], layer)


def _holders(*functions: Callable[..., Any]) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Every living layer that keeps one of the functions as a method of its own, with that function."""
    if not functions:
        return []
    methods = [m for m in gc.get_referrers(*functions) if isinstance(m, MethodType) and m.__func__ in functions]
    return [(method.__self__, method.__func__) for method in methods if isinstance(method.__self__, nn.Module)]


def _patch_layer(layer: nn.Module, function: Callable[..., Any], token: object) -> None:
    """Let one layer run `function`, below its hooks."""
    current, patches = _forward_of(layer), _layer_patches.setdefault(layer, {})
    if not patches and _runs_ours(layer) and current is not type(layer).forward:
        # A copy of a patched layer, which no call of patch_peft knows.
        patches[object()] = current
    patches[token] = function
    _given_back.discard(layer)
    if current is not function:
        vars(layer)["_old_forward" if "_old_forward" in vars(layer) else "forward"] = MethodType(function, layer)


def _settle(layer: nn.Module) -> None:
    """Let one layer run the newest of its patches that is left, or what its class does; a wrapper over it stays."""
    own, patches = vars(layer), _layer_patches.get(layer)
    function = list(patches.values())[-1] if patches else None
    for name in ("_old_forward", "forward"):
        if not _is_ours(getattr(own.get(name), "__func__", None)):
            continue
        if function is not None or name == "_old_forward":
            own[name] = MethodType(function or type(layer).forward, layer)
        else:
            del own[name]
    if function is None and _forward_of(layer) is not type(layer).forward:
        _given_back.add(layer)

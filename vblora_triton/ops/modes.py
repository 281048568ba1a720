"""What torch is doing around a call, and whether a tensor is what it was: each question asked in one place.

Most of it torch keeps private. Nothing else in the package looks there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

# Looked up once: each is asked several times in every call of a layer.
_modes_in_force = torch._C._len_torch_dispatch_stack
_is_included = torch._C._dispatch_tls_is_dispatch_key_included
_before_autograd = torch._C.DispatchKey.PreDispatch
_transform = torch._C._functorch.peek_interpreter_stack
_is_tracing = torch._C._is_tracing
_is_any_autocast = torch._C._is_any_autocast_enabled


def is_transformed() -> bool:
    """Say whether a transform of torch.func, or a forward-mode derivative, is under way.

    Only plain PyTorch has derivatives of every kind. A compiler traces what it then runs without them.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Say whether somebody records, replaces or transforms the operators that run.

    A compiler, torch.jit.trace, a dispatch mode (FlopCounterMode and selective checkpointing see only operators that
    they know, FakeTensorMode runs none of them; make_fx may stand before autograd), torch.func, forward-mode
    derivatives. The profiler does not count: it only looks at the time.
    """
    return (
        torch.compiler.is_compiling()
        or _modes_in_force() > 0
        or _is_included(_before_autograd)
        or _transform() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Say whether these are ordinary tensors, or None, in a call that nobody observes.

    Else a result must not outlive the call, nor memory be written that somebody may have noted.
    """
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter and tensor is not None:
            return False
    return not is_observed()


def is_autocast(x: Tensor) -> bool:
    """Say whether autocast is on for the device of x."""
    # The meta device has no autocast to ask about; torch 2.11 cannot compile torch.amp.is_autocast_available.
    return _is_any_autocast() and not x.is_meta and torch.is_autocast_enabled(x.device.type)


def below_autograd() -> AbstractContextManager[Any]:
    """Inside the context operators run without a look at autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def has_saved_tensor_hooks() -> bool:
    """Say whether somebody takes what is saved for backward, as checkpointing does, which compares and counts it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def stream_of(x: Tensor) -> int:
    """The stream on which work on x is queued; 0 on a CPU."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


class TensorState(NamedTuple):
    """A tensor's identity, memory and version: as long as all of them hold, so do its values.

    A write through `.data` to the same memory is not seen, nor is one by a fused optimizer.
    """

    tensor: weakref.ref[Tensor]
    storage: StorageWeakRef
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> TensorState:
        """Return the state of an ordinary tensor that was not made in inference mode."""
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(weakref.ref(tensor), storage, tensor.data_ptr(), tensor._version)

    def holds(self, tensor: Tensor) -> bool:
        """Say whether this is the tensor, unchanged."""
        return (
            self.tensor() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            # While the weak reference lives, no other storage has its address.
            and self.storage.cdata == tensor.untyped_storage()._cdata
        )


# tensor -> its state, and what was made of it then.
_beside: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept_beside(tensor: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Return make(), made once of a frozen tensor and kept as long as that lives and keeps its values (`TensorState`).

    Nothing is kept of a tensor of inference mode, whose changes are not counted, nor what is made while a CUDA graph is
    captured, whose memory is the graph's.
    """
    if tensor.is_inference():
        return make()
    state, made = _beside.get(tensor, (None, {}))
    if state is None or not state.holds(tensor):
        state, made = TensorState.of(tensor), {}
    if key in made:
        return made[key]
    # What is kept outlives an inference mode.
    with torch.inference_mode(False), torch.no_grad():
        found = make()
    if not (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        if tensor.is_cuda:
            # Other streams may read it from now on.
            torch.cuda.current_stream(tensor.device).synchronize()
        _beside[tensor] = state, made | {key: found}
    return found

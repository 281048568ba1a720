"""What the benchmark asks of the hardware: times, memory, launches, graphs. One class for CUDA, one for the CPU.

The suites know no more than `Device`, so that a CPU runs all of their code on tiny sizes: a rehearsal, whose times
mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.floors import Rates

Call = Callable[[int], object]


class Device:
    """One device, and how to measure on it.

    torch_device: where tensors go.
    name: what the results call it.
    activities: what the profiler is to look at.
    elements, side: of the copy and of the products that `rates` times.
    compile_backend: of torch.compile.
    """

    torch_device: torch.device
    name: str
    activities: tuple[ProfilerActivity, ...]
    elements: int
    side: int
    compile_backend: str

    def synchronize(self) -> None:
        """Wait until the device has done everything."""

    def time(self, function: Call, i: int) -> Callable[[], float]:
        """Run function(i), a GPU on cold caches; return what tells its milliseconds after the next `synchronize`."""
        raise NotImplementedError

    def peak_bytes(self, function: Call) -> int | None:
        """Memory that function(0) takes, at its height, beyond what is there; None where nobody counts."""
        function(0)
        return None

    def in_graph(self, function: Call) -> Call:
        """Capture function(0) once; the result replays it. Without graphs it is the call itself."""
        return lambda i: function(0)

    @staticmethod
    def is_launch(event: Any) -> bool:
        """Say whether an event of the profiler is one that `launches` counts."""
        raise NotImplementedError

    def compiled(self, model: nn.Module) -> nn.Module:
        """The model under torch.compile."""
        return torch.compile(model, backend=self.compile_backend)  # type: ignore[return-value]

    def launches(self, function: Call) -> int | None:
        """Count what the device runs in one call of function(0), by the profiler; None where nobody counts."""
        self.synchronize()
        with profile(activities=self.activities) as found:
            function(0)
            self.synchronize()
        return sum(event.count for event in found.key_averages() if self.is_launch(event))

    def rates(self) -> Rates:
        """Measure the copy bandwidth and the rates of large products of random numbers, now."""
        generator = torch.Generator(self.torch_device).manual_seed(0)

        def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.torch_device).normal_(generator=generator)

        source = random(self.elements, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / self.median_seconds(lambda i: target.copy_(source))
        products = []
        for dtype, side in ((torch.bfloat16, self.side), (torch.float32, self.side // 2)):
            a, b = random(side, side, dtype=dtype), random(side, side, dtype=dtype)
            out = torch.empty_like(a)
            seconds = self.median_seconds(lambda i, a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
            products.append(2 * side**3 / seconds)
        return Rates(copy, *products)

    def median_seconds(self, function: Call) -> float:
        """The median of ten runs after two for nothing."""
        waiting = [self.time(function, i) for i in range(12)]
        self.synchronize()
        return sorted(wait() for wait in waiting[2:])[5] * 1e-3


class Cuda(Device):
    """The GPU that torch sees first, timed by its own events."""

    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
    elements, side = 2**30, 8192
    compile_backend = "inductor"

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda")
        self.name = torch.cuda.get_device_name()
        # Several times the cache of any GPU there is; writing it also lets the host run ahead of the device.
        self._flush = torch.empty(2**28, dtype=torch.int8, device=self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def time(self, function: Call, i: int) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Each run starts with the same queue, an empty one, whoever came before: some wait for the device in the midst
        # of a call, others leave much behind, and the next one's launches would hide behind that.
        torch.cuda.synchronize()
        self._flush.zero_()
        start.record()
        function(i)
        end.record()
        return lambda: start.elapsed_time(end)

    def peak_bytes(self, function: Call) -> int | None:
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(0)
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def in_graph(self, function: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(0)

        def replay(i: int) -> object:
            graph.replay()
            return result

        return replay

    @staticmethod
    def is_launch(event: Any) -> bool:
        # The device's own list: the host's lacks the kernels inside a graph. It also holds copies, and the spans that
        # were named on the host.
        on_device = event.device_type == DeviceType.CUDA and not event.is_user_annotation
        return on_device and not event.key.startswith(("Memcpy", "Memset"))


class Cpu(Device):
    """A CPU in the place of a GPU. A graph is the call itself, memory is not counted, a launch is a torch operator.

    Args:
        clock: seconds, ever more of them.
    """

    activities = (ProfilerActivity.CPU,)
    elements, side = 2**22, 256
    # Inductor wants a C++ compiler.
    compile_backend = "aot_eager"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "CPU (a rehearsal: times mean nothing)"
        self._clock = clock

    def time(self, function: Call, i: int) -> Callable[[], float]:
        start = self._clock()
        function(i)
        elapsed = (self._clock() - start) * 1e3
        return lambda: elapsed

    @staticmethod
    def is_launch(event: Any) -> bool:
        return event.key.startswith("aten::")

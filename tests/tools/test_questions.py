"""What a GPU is asked, rehearsed on a CPU: each question has its answer, from the calls that it is about."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from bench.device import Cpu
from tools import questions


class Operators(TorchDispatchMode):
    """The names of the operators that compute something, and the shapes that they were given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and not function.is_view:
            self.found.append((str(function), *(tuple(t.shape) for t in args)))
        return function(*args, **kwargs or {})


def test_products_are_one_product_of_the_linears_sizes_each():
    cpu, calls = Cpu(), []

    def time(function, i):
        with Operators() as operators:
            function(i)
        calls.append(operators.found)
        return lambda: 1.0

    cpu.time = time
    (row,) = questions.products(cpu, ["tiny"], [20])
    assert row == {"shape": "tiny", "M": 20, "us": dict.fromkeys(("alone", "beta 1", "then added"), 1000.0)}
    x, weight, y = (20, 64), (64, 96), (20, 96)
    assert calls[::12] == [
        [("aten.mm.out", x, weight)],
        [("aten.addmm_.default", y, x, weight)],
        [("aten.mm.default", x, weight), ("aten.add_.Tensor", y, y)],
    ]


def test_the_gap_is_the_time_that_each_further_node_takes():
    # A clock that runs only where a node does something.
    cpu = Cpu()
    cpu._clock = lambda: cpu.count * 3e-6
    cpu.count = 0
    graph = cpu.in_graph

    def in_graph(function):
        inner = graph(function)

        def call(i):
            cpu.count += len(inner(i))

        return call

    cpu.in_graph = in_graph
    assert questions.gap(cpu) == pytest.approx(3.0)


def test_kernels_and_the_host_are_asked_of_both_methods():
    cpu = Cpu()
    rows = questions.kernels(cpu, ["tiny"], [20], h=12, b=16)
    assert [(row["method"], row["M"]) for row in rows] == [("vblora", 20), ("vera", 20)]
    assert all("aten::addmm_" in row["kernels_us"] or "aten::mm" in row["kernels_us"] for row in rows)
    found = questions.host(cpu, "tiny", 20, h=12, b=16)
    assert found.keys() == {"vblora", "vera"}
    assert all(0 < times["fwd"] < times["fwd_bwd"] for times in found.values())

"""The experiment of one product in the place of two: all its ways compute the same, and its flag runs it alone."""

import pytest
import torch

from bench import __main__ as bench
from bench import concatenation
from bench.device import Cpu
from tests.tolerance import relative_error


def test_each_way_computes_base_and_update():
    K, N, M, r = 64, 96, 20, 16
    ys = [call(0) for call in concatenation.calls(Cpu(), "tiny", M, r)]
    generator = torch.Generator().manual_seed(0)
    x, weight, p, B = (
        torch.empty(size).normal_(generator=generator).bfloat16().double() for size in ((M, K), (N, K), (M, r), (N, r))
    )
    for y in ys:
        assert y.shape == (M, N)
        # Two products round twice.
        assert relative_error(y, x @ weight.T + p @ B.T) < 2**-8


def test_the_flag_prints_a_row_for_each_size_and_measures_nothing_else(capsys):
    assert bench.main(["--concatenation", "--rehearse"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["linear", "tokens", "r"]
    assert [line.split()[:3] for line in lines[1:]] == [["tiny", "20", "16"], ["tiny", "80", "16"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_flag_wants_the_rehearsal(capsys):
    assert bench.main(["--concatenation"]) == 2
    assert "--rehearse" in capsys.readouterr().err

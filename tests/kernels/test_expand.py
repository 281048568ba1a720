"""The pass over dy, of one layer and of several that write what they find beside one another."""

import pytest
import torch

from tests.models import DEVICE
from tests.tolerance import relative_error
from vblora_triton.kernels.expand import launch_expand_bwd, new_dB, new_ds

VECTOR, H, TOPK = 24, 6, 2


def inputs(M: int, N: int, r: int):
    generator = torch.Generator().manual_seed(N)
    dy, s = (torch.randn(M, size, generator=generator) for size in (N, r))
    indices = torch.stack([torch.randperm(H, generator=generator)[:TOPK] for _ in range(N // VECTOR * r)])
    weights = torch.rand(indices.shape, generator=generator)
    return dy.to(DEVICE), s.to(DEVICE), indices.to(DEVICE, torch.int32), weights.to(DEVICE)


def expected(dy, s, bank, indices, weights):
    """ds (M, r), and dB by rows of the selection, in float64."""
    r = s.shape[1]
    rows = (bank.double()[indices.long()] * weights.double()[..., None]).sum(1)  # (tiles * r, VECTOR)
    B = rows.view(-1, r, VECTOR).transpose(1, 2).reshape(-1, r)
    dB = dy.double().T @ s.double()
    return dy.double() @ B, dB.view(-1, VECTOR, r).transpose(1, 2).reshape(-1, VECTOR)


@pytest.mark.parametrize(("M", "N", "r"), [(5, 24, 1), (70, 96, 3), (70, 264, 7)])
@pytest.mark.parametrize("chunks", [None, 1, 4])
def test_both_gradients_are_whole_in_however_many_partials_dB_has(M, N, r, chunks):
    bank = torch.randn(H, VECTOR, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    dy, s, indices, weights = given = inputs(M, N, r)
    ds, dB = new_ds(M, N, dy.dtype, r, dy.device), new_dB(M, N, dy.dtype, r, bank)
    if chunks is not None:
        # As many as a layer beside it has: fewer, or more than there are blocks of rows.
        dB = dB.new_full((chunks, *dB.shape[1:]), float("nan"))
    launch_expand_bwd(dy, s, bank, indices, weights, ds, dB)
    for found, truth in zip((ds.sum(0), dB.sum(0)), expected(*given[:2], bank, *given[2:]), strict=True):
        assert relative_error(found, truth) < 1e-6


def test_layers_write_side_by_side_and_nothing_else():
    M, r, bank = 20, 2, torch.randn(H, VECTOR, device=DEVICE)
    layers = [inputs(M, N, r) for N in (48, 48, 24)]
    rows = [len(indices) for _, _, indices, _ in layers]
    ds = new_ds(M, 48, torch.float32, r, layers[0][0].device, layers=3).fill_(7.0)
    dB = new_dB(M, 48, torch.float32, r, bank, rows=sum(rows)).fill_(7.0)
    for i in (0, 2):
        dy, s, indices, weights = layers[i]
        start = sum(rows[:i])
        own_ds = ds[..., i * r : (i + 1) * r][: len(new_ds(M, dy.shape[1], dy.dtype, r, dy.device))]
        launch_expand_bwd(dy, s, bank, indices, weights, own_ds, dB[:, start : start + rows[i]])
        truth = expected(dy, s, bank, indices, weights)
        assert relative_error(own_ds.sum(0), truth[0]) < 1e-6
        assert relative_error(dB[:, start : start + rows[i]].sum(0), truth[1]) < 1e-6
    assert (ds[..., r : 2 * r] == 7).all()
    assert (dB[:, rows[0] : rows[0] + rows[1]] == 7).all()

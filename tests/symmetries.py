"""What a network with turning vectors must keep: shared by the tests of the backbones in beyond/."""

import torch
from test_model import difference, random_orthogonal


def total(x, vec):
    """A scalar that depends on all of x and vec."""
    return x.square().sum() + vec.square().sum()


def slope(encoder, z, pos, batch, edge_index=None):
    """-> x, vec, d total / d pos."""
    pos = pos.detach().requires_grad_()
    x, vec = encoder(z, pos, batch, edge_index)
    return x.detach(), vec.detach(), torch.autograd.grad(total(x, vec), pos)[0]


def check_turned(encoder, z, pos, batch, determinant):
    """Each molecule, turned or mirrored, on the scale of its own numbers; a shift changes nothing."""
    turn = random_orthogonal(0, determinant).to(pos.device)
    x, vec, gradient = slope(encoder, z, pos, batch)
    x_turned, vec_turned, gradient_turned = slope(encoder, z, pos @ turn.T + 1.5, batch)
    for k in range(int(batch[-1]) + 1):
        mine = batch == k
        assert difference(x_turned[mine], x[mine]) < 1e-9, k
        for found, reference in ((vec_turned, turn @ vec), (gradient_turned, gradient @ turn.T)):
            assert (found[mine] - reference[mine]).abs().max() < 1e-9 * reference[mine].abs().max().clamp(min=1), k
    assert vec.abs().max() > 0.1 and gradient.abs().max() > 0.1
    assert difference(x.flip(0), x) > 0.1  # so that the comparison means something


def check_order(encoder, z, pos, batch):
    """The order of the atoms inside a molecule does not matter."""
    key = torch.rand(len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(pos.device)
    order = torch.argsort(batch + key)  # stays inside the molecules
    assert not torch.equal(order, torch.arange(len(z), device=pos.device))
    for ours, reference in zip(slope(encoder, z[order], pos[order], batch), slope(encoder, z, pos, batch), strict=True):
        assert difference(ours, reference[order]) < 1e-9

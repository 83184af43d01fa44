"""The objectives of pretrain.py: every loss against its equation, and what each of them reaches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_parity import molecule
from test_model import PUBLISHED, WHITEN_LAYERS, difference, fill, join, single, small
from torch import nn

from model import EquivariantTransformer
from pretrain import GraphPooling, Pretraining


def settings(**changes):
    defaults = dict(objective="georecon", alpha=1.0, w_noise=1.0, w_clean=0.7, w_rec=0.45, position_noise_scale=0.04)
    defaults |= dict(
        rec_target="scaled", decoder_layers=1, decoder_vec=True, decoder_graph_emb=True, pooling="mean", model=small()
    )
    return SimpleNamespace(**defaults | changes)


def pretraining(device, encoder=None, **changes):
    config = settings(**changes)
    return fill(Pretraining(encoder or EquivariantTransformer(config.model), config)).to(device, torch.float64)


def batch_and_noise(device):
    z, pos, batch = join([molecule(name) for name in ("acetamide", "water", "aspirin")], device)
    noise = torch.randn(pos.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    return z, pos, batch, noise, 3


@pytest.mark.parametrize("alpha, rec_target", [(1.0, "scaled"), (1.3, "scaled"), (1.3, "unit")])
@pytest.mark.parametrize("objective", ["coord", "georecon", "rec_only"])
def test_losses_equal_their_equations(objective, alpha, rec_target, device):
    """Against three encoder calls of their own and loops: the fused and the two-encoding form change nothing."""
    method = pretraining(device, objective=objective, alpha=alpha, rec_target=rec_target)
    z, pos, batch, noise, B = batch_and_noise(device)
    losses = method(z, pos, batch, noise, B, shuffle=True)
    target = noise if rec_target == "unit" else alpha * noise

    def mean_square(error):
        return np.square(error.detach().cpu().numpy()).mean()

    sigma = 0.04
    x_noised, vec_noised = method.encoder(z, pos + sigma * noise, batch)
    expected = dict(loss_noise=mean_square(method.noise_head(x_noised, vec_noised) - noise))
    expected["loss"] = expected["loss_noise"]
    if objective != "coord":
        x_clean, vec_clean = method.encoder(z, pos, batch)
        pos_rec = pos + sigma * alpha * noise
        x_rec, vec_rec = method.encoder(z, pos_rec, batch)
        graph_emb = torch.stack([x_clean[batch == b].mean(0) for b in range(B)])
        expected["loss_clean"] = mean_square(method.noise_head(x_clean, vec_clean))
        for name, g in (("loss_rec", graph_emb), ("loss_rec_shuffled", graph_emb[[2, 0, 1]])):
            decoder = method.decoder
            x = decoder.combine(torch.cat([x_rec, g[batch]], dim=1))
            x, vec = decoder.layers(x, vec_rec, decoder.graph(pos_rec, batch))
            expected[name] = mean_square(decoder.head(x, vec) - target)
        w_clean = 0 if objective == "rec_only" else 0.7
        expected["loss"] += w_clean * expected["loss_clean"] + 0.45 * expected["loss_rec"]
        assert abs(expected["loss_rec"] - expected["loss_rec_shuffled"]) > 1e-4  # g is used
        assert expected["loss_clean"] > 0
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-11), name


def test_without_a_graph_embedding_the_decoder_knows_its_own_atoms_alone(device):
    """The losses are those of a decoder that is given zero, and nothing of loss_rec reaches the clean molecule."""
    method = pretraining(device, Recorded(16), decoder_graph_emb=False)
    z, pos, batch, noise, B = batch_and_noise(device)
    losses = method(z, pos, batch, noise, B, shuffle=True)
    (gradient,) = torch.autograd.grad(losses["loss_rec"], method.encoder.leaves[:1], retain_graph=True)
    assert gradient[: len(z)].any() and not gradient[len(z) :].any()
    method.config.decoder_graph_emb = True
    method.pooling.register_forward_hook(lambda module, arguments, out: torch.zeros_like(out))
    given_zero = method(z, pos, batch, noise, B, shuffle=True)
    assert all(losses[name].item() == given_zero[name].item() for name in losses)
    assert losses["loss_rec_shuffled"].item() == losses["loss_rec"].item()


@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_the_encoder_is_called_once_with_two_or_three_variants(alpha, device):
    calls = []
    method = pretraining(device, alpha=alpha)
    method.encoder.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    z, pos, batch, noise, B = batch_and_noise(device)
    method(z, pos, batch, noise, B)
    variants = [pos + 0.04 * noise, pos] + ([pos + 0.04 * alpha * noise] if alpha != 1 else [])
    assert len(calls) == 1
    z_all, pos_all, batch_all = calls[0]
    assert torch.equal(z_all, torch.cat([z] * len(variants)))
    assert difference(pos_all, torch.cat(variants)) < 1e-14
    assert torch.equal(batch_all, torch.cat([batch + k * B for k in range(len(variants))]))


class Recorded(nn.Module):
    """An encoder that returns leaves: which rows a loss reaches is then its gradient for them."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, z, pos, batch):
        generator = torch.Generator().manual_seed(0)
        shapes = (len(z), self.channels), (len(z), 3, self.channels)
        self.leaves = [
            torch.randn(shape, dtype=pos.dtype, generator=generator).to(pos.device).requires_grad_() for shape in shapes
        ]
        return self.leaves


@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_each_loss_reaches_exactly_its_own_variant(alpha, device):
    """Any encoder (z, pos, batch) -> x, vec will do. The clean x, not the clean vec, carries loss_rec's graph_emb."""
    method = pretraining(device, Recorded(16), alpha=alpha)
    z, pos, batch, noise, B = batch_and_noise(device)
    rec = "noised" if alpha == 1 else "rec"
    expected = {
        "loss_noise": {("x", "noised"), ("vec", "noised")},
        "loss_clean": {("x", "clean"), ("vec", "clean")},
        "loss_rec": {("x", rec), ("vec", rec), ("x", "clean")},
    }
    losses = method(z, pos, batch, noise, B)
    for name, reached in expected.items():
        gradients = torch.autograd.grad(losses[name], method.encoder.leaves, retain_graph=True)
        found = set()
        for tensor, gradient in zip(("x", "vec"), gradients):
            for k, variant in enumerate(("noised", "clean", "rec")[: len(gradient) // len(z)]):
                rows = gradient[k * len(z) : (k + 1) * len(z)].flatten(1)
                if rows.any():
                    assert rows.any(dim=1).all(), f"{name} reaches some atoms of {variant} {tensor} only"
                    found.add((tensor, variant))
        assert found == reached, name


@pytest.mark.parametrize("detach", [False, True])
def test_loss_rec_trains_the_encoder_through_the_graph_embedding(detach, device):
    """A detached graph embedding (the likeliest slip) leaves the clean rows without a gradient: the test would see."""
    method = pretraining(device, Recorded(16))
    if detach:
        method.pooling.register_forward_hook(lambda module, arguments, out: out.detach())
    z, pos, batch, noise, B = batch_and_noise(device)
    loss_rec = method(z, pos, batch, noise, B)["loss_rec"]
    (gradient,) = torch.autograd.grad(loss_rec, method.encoder.leaves[:1])
    assert gradient[len(z) :].any() == (not detach)


@pytest.mark.parametrize(
    "changes",
    [
        dict(objective="coord"),
        dict(objective="rec_only"),
        dict(alpha=1.3),
        *(dict(decoder_layers=n) for n in (0, 1, 2)),
        dict(decoder_vec=False),
        dict(decoder_graph_emb=False, pooling="attention"),
        *(dict(pooling=kind) for kind in ("mean", "sum", "attention")),
        *(dict(model=small(**norms)) for norms in (PUBLISHED, WHITEN_LAYERS, dict(vector_cutoff=True))),
        dict(model=small(num_layers=1)),
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes, device):
    """DDP without a search for unused parameters needs it, in every step and for every choice."""
    method = pretraining(device, **changes)
    z, pos, batch, noise, B = batch_and_noise(device)
    method(z, pos, batch, noise, B)["loss"].backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in method.parameters())
    # a first layer meets vec = 0: exactly these have a zero gradient there
    zero = {name.removeprefix("encoder.") for name, p in method.named_parameters() if not p.grad.any()}
    assert {name for name in zero if name.startswith(("attention_layers", "decoder"))} <= {
        "attention_layers.0.vec_proj.weight",
        *(["decoder.attention_layers.0.vec_proj.weight"] if "decoder_vec" in changes else []),
    }


@pytest.mark.parametrize("kind", ["mean", "sum", "attention"])
def test_pooling_equals_a_loop_over_molecules(kind, device):
    pooling = fill(GraphPooling(kind, 8)).to(device, torch.float64)
    batch = torch.tensor([0, 1, 1, 1, 2, 2], device=device)
    x = 30 * torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    x.requires_grad_()
    graph_emb = pooling(x, batch, 3)
    expected = []
    for b in range(3):
        own = x[batch == b]
        if kind == "attention":
            expected.append((pooling.score(own).softmax(0) * own).sum(0))
        else:
            expected.append(own.sum(0) if kind == "sum" else own.mean(0))
    expected = torch.stack(expected)
    assert difference(graph_emb.detach(), expected.detach()) < 1e-12
    weight = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    ours, loop = (torch.autograd.grad((g * weight).sum(), x, retain_graph=True)[0] for g in (graph_emb, expected))
    assert difference(ours, loop) < 1e-10


def test_attention_pooling_does_not_overflow(device):
    pooling = fill(GraphPooling("attention", 8)).to(device)
    x = 1e4 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(device)
    assert pooling(x, torch.tensor([0, 0, 0, 1, 1, 1], device=device), 2).isfinite().all()


def test_one_molecule_has_no_other_to_shuffle_with(device):
    method = pretraining(device)
    z, pos, batch = single("acetamide", device)
    losses = method(z, pos, batch, torch.randn_like(pos), 1, shuffle=True)
    assert losses["loss_rec"].item() == losses["loss_rec_shuffled"].item()

"""beyond/scd.py: the loss against its equation, symmetries, what is random, and the later stages on its encoder."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_parity import molecule
from test_model import GENERIC, all_molecules, difference, fill, join, random_orthogonal, small
from tiny_run import read_log, run, same_bits

import finetune
import lipschitz
import pretrain
from beyond.scd import AdaptiveTransformer, SelfConditioned, uniform
from harness.errors import InputError
from model import EquivariantTransformer, load_encoder, new_encoder, radius_graph

SCD = ["objective=scd", "model.backbone=adaptive"]
ADAPTIVE = small(backbone="adaptive")


def objective(device, encoder=None, **changes):
    settings = dict(objective="scd", position_noise_scale=0.04, clean_noise_scale=0.005, mask_probability=0.2)
    config = SimpleNamespace(**settings | dict(drop_path=0.0, model=ADAPTIVE) | changes)
    return fill(SelfConditioned(encoder or AdaptiveTransformer(ADAPTIVE), config)).to(device, torch.float64)


def batch_and_noise(device, columns=7):
    z, pos, batch = join([molecule(name) for name in ("acetamide", "water", "aspirin")], device)
    noise = torch.randn(len(z), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z, pos, batch, noise.to(device), 3


def test_losses_equal_their_equation(device):
    """L = mean |head(encoder(noised, g)) - eps / sigma|^2, molecule by molecule, with g, another's and the token."""
    method = objective(device).eval()
    z, pos, batch, noise, B = batch_and_noise(device)
    losses = method(z, pos, batch, noise, B, shuffle=True)
    assert losses.keys() == {"loss", "loss_noise", "loss_noise_masked", "loss_noise_shuffled"}

    def error_of(graph_emb):
        errors = []
        for b in range(B):
            atoms = batch == b
            condition = graph_emb[b : b + 1]
            zero = torch.zeros_like(batch[atoms])
            x, vec = method.encoder(z[atoms], pos[atoms] + 0.04 * noise[atoms, :3], zero, graph_emb=condition)
            errors.append((method.noise_head(x, vec) - noise[atoms, :3]).square())
        return torch.cat(errors).mean().item()

    x, _ = method.encoder(z, pos + 0.005 * noise[:, 3:6], batch)
    atoms = method.project_atom(x)
    g = method.project_molecule(torch.stack([atoms[batch == b].sum(0) for b in range(B)]))
    token = method.encoder.mask_token.expand_as(g)
    for name, condition in (("", g), ("_masked", token), ("_shuffled", g[[2, 0, 1]])):
        assert losses[f"loss_noise{name}"].item() == pytest.approx(error_of(condition), rel=1e-10), name
    values = [loss.item() for loss in losses.values()]
    assert values[0] == values[1] and min(abs(np.diff(values[1:]))) > 1e-4  # g and the token are used


def test_without_g_it_is_coord_on_its_network(device):
    """Loss and gradients, if every molecule is masked. So the studies have one arm for both."""
    scd = objective(device, mask_probability=1.0).train()
    z, pos, batch, noise, B = batch_and_noise(device)
    settings = SimpleNamespace(objective="coord", position_noise_scale=0.04, alpha=1.0, model=ADAPTIVE)
    coord = pretrain.Pretraining(scd.encoder, settings).to(device, torch.float64)
    coord.noise_head = scd.noise_head
    weights = [*scd.encoder.parameters(), *scd.noise_head.parameters()]
    with_g = scd(z, pos, batch, noise, B)["loss"]
    alone = coord(z, pos, batch, noise[:, :3], B)["loss"]
    assert with_g.item() == pytest.approx(alone.item(), rel=1e-12)
    for p, q in zip(torch.autograd.grad(with_g, weights), torch.autograd.grad(alone, weights), strict=True):
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-14)
    for loss in scd.eval()(z, pos, batch, noise, B, shuffle=True).values():  # validated without g, too
        assert loss.item() == pytest.approx(alone.item(), rel=1e-12)


def test_no_condition_is_the_mask_token(device):
    z, pos, batch = all_molecules(device)
    encoder = fill(AdaptiveTransformer(ADAPTIVE)).to(device, pos.dtype)
    token = encoder.mask_token.expand(int(batch[-1]) + 1, -1)
    for plain, given in zip(encoder(z, pos, batch), encoder(z, pos, batch, graph_emb=token), strict=True):
        assert difference(plain, given.detach()) < 1e-12


def test_ungated_is_the_network_with_gates_of_1(device):
    z, pos, batch = all_molecules(device)
    gated, F = fill(AdaptiveTransformer(ADAPTIVE)).to(device, pos.dtype), ADAPTIVE.embedding_dimension
    with torch.no_grad():
        for norm in gated.adaptive_norms:
            norm.modulation[-1].weight[2 * F :] = 0
            norm.modulation[-1].bias[2 * F :] = 1e9 * norm.b.sign()  # tanh(b * this) = 1
    ungated = new_encoder(small(backbone="ungated")).to(device, pos.dtype)
    shapes = {name: len(weights) for name, weights in ungated.state_dict().items()}
    state = {name: weights for name, weights in gated.state_dict().items() if name in shapes}
    assert len(gated.state_dict()) == len(shapes) + ADAPTIVE.num_layers  # the b of each layer
    ungated.load_state_dict({name: weights[: shapes[name]] for name, weights in state.items()})
    for a, b in zip(gated(z, pos, batch), ungated(z, pos, batch), strict=True):
        assert difference(a, b.detach()) < 1e-12


def test_the_mask_is_drawn_for_each_molecule(device):
    """Its share is mask_probability; a masked molecule's loss does not depend on g, another's does."""
    numbers = torch.from_numpy(np.random.default_rng(0).standard_normal(20_000))
    assert (uniform(numbers) < 0.2).double().mean().item() == pytest.approx(0.2, abs=0.01)
    z, pos, batch, noise, B = batch_and_noise(device)
    first = [0, 9, 12]
    noise[first, 6] = torch.tensor([-3.0, 3.0, 3.0], dtype=noise.dtype, device=device)  # the first is masked
    method = objective(device)
    trained = method(z, pos, batch, noise, B)
    x, _ = method.encoder(z, pos + 0.005 * noise[:, 3:6], batch)
    atoms = method.project_atom(x)
    g = method.project_molecule(torch.stack([atoms[batch == b].sum(0) for b in range(B)]))
    g = torch.cat([method.encoder.mask_token[None], g[1:]])
    noised = method.encoder(z, pos + 0.04 * noise[:, :3], batch, graph_emb=g)
    expected = (method.noise_head(*noised) - noise[:, :3]).square().mean()
    assert trained["loss"].item() == pytest.approx(expected.item(), rel=1e-10)


def test_drop_path_drops_increments_of_atoms(device):
    """A share of 1 - keep of the increments is gone, the others grow by as much; with all kept nothing changes."""
    z, pos, batch, noise, B = batch_and_noise(device, 7 + 3)
    with_path, without = objective(device, drop_path=0.4), objective(device)
    assert (with_path.extra_noise, without.extra_noise) == (7, 4)
    kept = noise.clone()
    kept[:, 7:] = 9.0  # no increment falls
    losses = [with_path(z, pos, batch, n, B)["loss"].item() for n in (noise, kept)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)
    encoder = with_path.encoder
    none = encoder(z, pos, batch, keep=torch.zeros(3, len(z), dtype=pos.dtype, device=device))
    assert not none[1].any()  # without increments no vector ever grows
    one = encoder(z, pos, batch, keep=torch.ones(3, len(z), dtype=pos.dtype, device=device))
    assert difference(one[0], encoder(z, pos, batch)[0].detach()) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_equivariance(seed, device):
    z, pos, batch = all_molecules(device)
    encoder = fill(AdaptiveTransformer(ADAPTIVE)).to(device, pos.dtype)
    turn = random_orthogonal(seed, 1 - 2 * seed).to(device)
    g = torch.randn(int(batch[-1]) + 1, 16, dtype=pos.dtype, device=device)
    for condition in (None, g):
        x, vec = encoder(z, pos, batch, graph_emb=condition)
        x_turned, vec_turned = encoder(z, pos @ turn.T + 1.5, batch, graph_emb=condition)
        assert difference(x_turned, x.detach()) < 1e-9
        assert difference(vec_turned.mT, vec.detach().mT @ turn.T) < 1e-9


@pytest.mark.parametrize("name", ["CH4", "CO2", "one atom", *GENERIC])
def test_derivatives_are_finite_and_those_of_the_output(name, device):
    """The modulation keeps its gradient: a slope by autograd equals one by differences."""
    from test_model import single

    z, pos, batch = single(name, device)
    encoder = fill(AdaptiveTransformer(ADAPTIVE)).to(device, pos.dtype)
    weight = torch.randn(16, dtype=pos.dtype, generator=torch.Generator().manual_seed(1)).to(device)

    def energy(pos):
        return (encoder(z, pos, batch)[0] @ weight).sum()

    leaf = pos.clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    slope.square().sum().backward()
    assert slope.isfinite().all() and leaf.grad.isfinite().all()
    way = torch.randn(pos.shape, dtype=pos.dtype, generator=torch.Generator().manual_seed(2)).to(device)
    by_differences = (energy(pos + 1e-5 * way) - energy(pos - 1e-5 * way)) / 2e-5
    scale = max(1.0, slope.abs().max().item())
    assert (slope.detach() * way).sum().item() == pytest.approx(by_differences.item(), abs=1e-7 * scale)


def test_known_pairs_change_nothing(device):
    z, pos, batch = all_molecules(device)
    encoder = fill(AdaptiveTransformer(ADAPTIVE)).to(device, pos.dtype)
    for pairs in (radius_graph(pos, batch, 5.0), radius_graph(pos, batch, math.inf)):
        assert difference(encoder(z, pos, batch, pairs)[0], encoder(z, pos, batch)[0].detach()) < 1e-9


def test_every_weight_gets_a_gradient_even_if_all_are_masked(device):
    """DistributedDataParallel waits for each of them."""
    method = objective(device, mask_probability=1.0)
    method(*batch_and_noise(device))["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_another_encoder_is_refused(device):
    with pytest.raises(InputError, match="model.backbone=adaptive") as refused:
        objective(device, EquivariantTransformer(small()))
    assert refused.value.code == 2


# ---------------------------------------------------------------- runs


def test_a_stopped_run_goes_on_to_the_same_bits(tiny):
    settings = [*SCD, "drop_path=0.1", "max_steps=8"]
    pretrain.main([str(tiny), *settings, "out_dir=out/whole"])
    pretrain.main([str(tiny), *settings, "out_dir=out/again", "max_steps=3"])
    pretrain.main([str(tiny), *settings, "out_dir=out/again", "resume=true"])
    assert same_bits("out/whole", "out/again")


@pytest.mark.slow
def test_two_ranks_equal_one(tiny):
    settings = [*SCD, "drop_path=0.1"]
    pretrain.main([str(tiny), *settings, "out_dir=out/whole"])
    run(tiny, *settings, "out_dir=out/two", ranks=2)
    for split in ("train", "val"):
        for a, b in zip(read_log("out/whole", split), read_log("out/two", split), strict=True):
            for name in (name for name in a if name.startswith("loss")):
                assert a[name] == pytest.approx(b[name], rel=1e-4), (split, a["step"], name)


@pytest.mark.parametrize("name, network", [("coord", "adaptive"), ("georecon", "adaptive"), ("coord", "ungated")])
def test_the_other_objectives_train_the_adaptive_network(tiny, name, network):
    pretrain.main([str(tiny), f"objective={name}", f"model.backbone={network}", "max_steps=3"])
    assert load_encoder("out/tiny/encoder.pt").gated == (network == "adaptive")


def test_later_stages_take_its_encoder(tiny, capsys):
    """Properties, forces, probing and the Lipschitz constant; best.pt gives back what was trained."""
    root = Path(pretrain.__file__).parent
    pretrain.main([str(tiny), *SCD, "max_steps=3"])
    start = "init_from=out/tiny/encoder.pt"
    gap = [str(root / "configs/demo_gap.yaml"), f"data={root / 'data/qm9_demo.h5'}", start, "max_steps=3"]
    gap += ["batch_size=4", "train_size=40", "val_size=10", "test_size=10"]
    finetune.main([*gap, "out_dir=out/gap"])
    model, _ = finetune.load_property_model("out/gap/best.pt")
    assert isinstance(model.encoder, AdaptiveTransformer)
    forces = [str(root / "configs/demo_forces.yaml"), f"data={root / 'data/ethanol_demo.h5'}", start, "max_steps=3"]
    finetune.main([*forces, "batch_size=4", "train_size=40", "val_size=10", "test_size=10", "out_dir=out/forces"])
    assert json.loads(Path("out/forces/metrics.json").read_text())["test"]
    lipschitz.main(["out/tiny/encoder.pt", f"data={root / 'data/qm9_demo.h5'}", "num_molecules=3", "out_dir=out/llc"])
    assert json.loads(Path("out/llc/lipschitz.json").read_text())["checkpoints"]


def test_an_older_checkpoint_is_of_the_plain_transformer(tiny):
    """Before there was a choice of backbones its name was not written."""
    pretrain.main([str(tiny), "max_steps=1"])
    content = torch.load("out/tiny/encoder.pt", weights_only=True)
    del content["model"]["backbone"]
    torch.save(content, "old.pt")
    assert type(load_encoder("old.pt")) is EquivariantTransformer


@pytest.mark.slow
def test_compiled_equals_uncompiled(tiny):
    pretrain.main([str(tiny), *SCD])
    pretrain.main([str(tiny), *SCD, "compile=true", "out_dir=out/compiled"])
    for a, b in zip(read_log("out/tiny"), read_log("out/compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_compiled_forces_equal_eager_ones(tiny, capsys):
    """Fine-tuning on forces compiles the encoder as a whole, with its derivative."""
    root = Path(pretrain.__file__).parent
    pretrain.main([str(tiny), *SCD, "max_steps=1", "model.num_layers=2"])
    settings = [str(root / "configs/demo_forces.yaml"), f"data={root / 'data/ethanol_demo.h5'}"]
    settings += ["init_from=out/tiny/encoder.pt", "max_steps=4", "batch_size=4", "log_every=1"]
    settings += ["train_size=40", "val_size=10", "test_size=10"]
    finetune.main([*settings, "out_dir=out/eager"])
    finetune.main([*settings, "out_dir=out/compiled", "compile=true"])
    for a, b in zip(read_log("out/eager"), read_log("out/compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)

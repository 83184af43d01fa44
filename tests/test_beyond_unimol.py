"""beyond/unimol.py, unimol_objective.py: equal to unimol_tools, equivariant, and each loss what its equation says."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from make_parity import MOLECULES, collate
from make_parity_unimol import PATH, SETTING, STATISTICS, corrupted, weights
from symmetries import check_order, check_turned, slope, total
from test_model import (
    DTYPES,
    SYMMETRIC,
    all_molecules,
    assert_one_jacobian,
    difference,
    random_orthogonal,
    single,
)
from tiny_run import DEMO, read_log, run, same_bits
from torch.nn.functional import smooth_l1_loss

import finetune
import lipschitz
import pretrain
from beyond.unimol import CLS, ELEMENTS, FIRST, MASK, NUM_TOKENS, PAD, SEP, UNK, Layer, UniMol, load_public, pad
from beyond.unimol_objective import SHARE, Distances, UniMolPretraining, corrupt
from data import Molecules
from formats.weights import read_encoder
from harness.errors import InputError
from model import EquivariantTransformer, ModelConfig, load_encoder, radius_graph

SMALL = dict(embedding_dimension=16, num_layers=3, num_rbf=16, num_heads=4)
SIZES = [  # layers, channels, heads; parameters of the whole pretraining model, of which UniMol but for vec_proj
    (15, 512, 64, 47_618_915),
    (6, 256, 32, 4_846_915),
    (4, 128, 8, 838_251),
    (4, 64, 8, 228_395),
]


def fill(module):
    module.load_state_dict(module.state_dict() | weights({n: p.shape for n, p in module.named_parameters()}))
    return module


def build(device, dtype=torch.float64, **changes):
    """A small Uni-Mol with random weights, biases and norms."""
    return fill(UniMol(ModelConfig(backbone="unimol", **SMALL | changes))).to(device, dtype)


def objective(device, name="unimol", shape=SMALL, dtype=torch.float64, **changes):
    model = ModelConfig(backbone="unimol", **shape)
    config = replace(pretrain.PretrainConfig(), objective=name, position_noise_scale=1.0, model=model, **changes)
    return fill(UniMolPretraining(UniMol(model), config)).to(device, dtype)


def demo(device, num=6, columns=7):
    """Real molecules: z, pos in float64, batch, noise."""
    part = Molecules(DEMO).read(range(20, 20 + num))
    noise = torch.randn(len(part["z"]), columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return tuple(t.to(device) for t in (part["z"], part["pos"].double(), part["batch"], noise))


STATED = torch.tensor(STATISTICS, dtype=torch.float64)

# ---------------------------------------------------------------- parity with unimol_tools


def peers_twin(device, dtype=torch.float64):
    """The objective with the weights that the maker gives to its peer, which are drawn in the order of public names."""
    method = objective(device, shape=SETTING, dtype=dtype)
    shapes = {name.removeprefix("encoder."): value.shape for name, value in method.state_dict().items()}
    load_public(method, weights({name: shape for name, shape in shapes.items() if name != "vec_proj.weight"}))
    return method


@pytest.fixture(scope="module")
def parity():
    with np.load(PATH) as file:
        return dict(file)


def hidden(names, device):
    """What the maker's corrupted says of molecules, end to end, and batch (N,)."""
    parts = [torch.cat(part).to(device) for part in zip(*(corrupted(name) for name in names))]
    sizes = torch.tensor([len(corrupted(name)[0]) for name in names])
    return *parts, torch.arange(len(names)).repeat_interleave(sizes).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_outputs_equal_unimol_tools(parity, dtype, device):
    """Scores of tokens, distances, coordinates and both norms; the tolerance is that of the dtype."""
    method = peers_twin(device, dtype)
    token, pos, seen, moved, chosen, batch = hidden(MOLECULES, device)
    code, slot = method.encoder.encode(seen, moved.to(dtype), batch)
    x = method.encoder.invariant(code).flatten(0, 1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert difference(method.lm_head(x[slot[chosen]]).detach(), parity["logits"]) < tolerance
    _, place, _ = pad(seen, moved.to(dtype), batch)
    real = code.real.cpu()
    coordinates = torch.from_numpy(parity["coordinates"])[:, :-1]
    assert difference((place + method.update(code)).detach()[real], coordinates[real]) < tolerance
    pairs = real.unsqueeze(1) & real.unsqueeze(2)
    distances = torch.from_numpy(parity["distances"])[:, :-1, :-1]
    assert difference(method.dist_head(code.last).detach()[pairs], distances[pairs]) < tolerance
    each = torch.arange(len(MOLECULES), device=device)  # the peer's norms are means over molecules, not over atoms
    target = torch.zeros_like(code.step[..., 0])
    losses = method.masked_losses(code, x.view(*code.x.shape), slot, chosen, token, moved - pos, each, target)
    for name in ("x_norm", "pair_norm"):
        assert losses[f"loss_{name}"].item() == pytest.approx(parity[name].item(), rel=100 * tolerance), name


@pytest.mark.parametrize("name", MOLECULES)
def test_the_losses_of_a_molecule_equal_those_of_unimol_tools(parity, name, device):
    """Its mean over the chosen atoms is our sum over 0.15 N, but for that factor."""
    method = peers_twin(device)
    token, pos, seen, moved, chosen, batch = hidden([name], device)
    code, slot = method.encoder.encode(seen, moved, batch)
    clean = pad(token, pos, batch)[1]
    target = ((clean[:, None] - clean[:, :, None]).norm(dim=-1) - STATISTICS[0]) / STATISTICS[1]
    x = method.encoder.invariant(code)
    losses = method.masked_losses(code, x, slot, chosen, token, pos - moved, batch, target)
    factor = SHARE * len(token) / chosen.sum().item()
    ours = np.array([loss.item() for loss in losses.values()]) * [factor, factor, factor, 1, 1]
    theirs = parity[f"losses/{name}"]
    assert ours == pytest.approx(theirs[:5], rel=1e-6)
    assert ours @ [1, 5, 10, 0.01, 0.01] == pytest.approx(theirs[5], rel=1e-6)


def test_a_public_state_dict_loads_by_name(parity):
    shapes = json.loads(parity["state_dict_512_15_64"].tobytes())
    theirs = {name: torch.full(shape, float(k)) for k, (name, shape) in enumerate(shapes.items())}
    layers, channels, heads, _ = SIZES[0]
    model = ModelConfig(embedding_dimension=channels, num_layers=layers, num_heads=heads, num_rbf=128)
    with torch.device("meta"):
        method = UniMolPretraining(UniMol(model), pretrain.PretrainConfig(objective="unimol", model=model))
    method.to_empty(device="cpu")
    load_public(method, theirs)
    ours = {name.removeprefix("encoder."): value for name, value in method.state_dict().items()}
    assert ours.keys() - theirs.keys() == {"vec_proj.weight"} and not theirs.keys() - ours.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(ValueError, match="gbf.means.weight missing"):
        load_public(method.encoder, {name: value for name, value in theirs.items() if name != "gbf.means.weight"})


@pytest.mark.parametrize(("layers", "channels", "heads", "count"), SIZES)
def test_parameter_counts(layers, channels, heads, count):
    """What trains is the public model, weight for weight. vec_proj comes on top."""
    model = ModelConfig(embedding_dimension=channels, num_layers=layers, num_heads=heads, num_rbf=128)
    with torch.device("meta"):
        method = UniMolPretraining(UniMol(model), pretrain.PretrainConfig(objective="unimol", model=model))
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == count
    assert pretrain.num_parameters(method) == count + channels * heads


def test_the_start():
    torch.manual_seed(0)
    encoder = UniMol(ModelConfig(embedding_dimension=64, num_layers=2, num_heads=8, num_rbf=128))
    for name, value in encoder.named_parameters():
        if name.startswith("gbf."):
            low, high = {"means": (0, 3), "stds": (0, 3), "mul": (1, 1), "bias": (0, 0)}[name.split(".")[1]]
            assert low <= value.min() and value.max() <= high, name
        elif name.endswith("bias"):
            assert not value.any(), name
        elif "norm" not in name and name != "vec_proj.weight":
            assert value.std().item() == pytest.approx(0.02, rel=0.15), name
    assert not encoder.embed_tokens.weight[PAD].any()


# ---------------------------------------------------------------- tokens and rows


def test_tokens(device):
    encoder = build(device)
    z = torch.tensor([6, 1, 3, 2], device=device)
    with pytest.warns(UserWarning, match=r"atomic numbers \[2\] are none of Uni-Mol's 26 elements"):
        assert encoder.tokens(z).tolist() == [4, 8, 29, UNK]
    assert len(set(ELEMENTS)) == len(ELEMENTS) == 26 and (MASK, NUM_TOKENS) == (30, 31)
    assert "token_of" not in encoder.state_dict()


def test_rows_of_tokens(device):
    z, pos, batch = (part.to(device) for part in collate(["water", "methane"]))
    token, place, slot = pad(build(device).tokens(z), pos, batch)
    assert token.tolist() == [[CLS, 6, 8, 8, SEP, PAD, PAD], [CLS, 4, 8, 8, 8, 8, SEP]]
    assert slot.tolist() == [1, 2, 3, 8, 9, 10, 11, 12]
    assert difference(place.flatten(0, 1)[slot[3:]], pos[3:] - pos[3:].mean(0)) < 1e-12
    assert not place[0, [0, 4, 5, 6]].any() and not place[1, [0, 6]].any()


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
@pytest.mark.parametrize("molecules", [all_molecules, lambda device: demo(device)[:3]], ids=["symmetric", "QM9"])
def test_equivariance(molecules, determinant, device):
    """Each molecule on the scale of its own numbers; a shift changes nothing."""
    check_turned(build(device), *molecules(device), determinant)


def test_symmetry_forces_the_vectors_of_some_atoms_to_zero(device):
    encoder = build(device)
    for name, atom in (("one atom", 0), ("CH4", 0), ("SF6", 0), ("CO2", 1)):
        _, vec = encoder(*single(name, device))
        assert vec[atom].abs().max() < 1e-12, name
        assert len(vec) == 1 or vec.abs().max() > 1e-3, name


def test_the_order_of_the_atoms_does_not_matter(device):
    check_order(build(device), *all_molecules(device))


def test_a_molecule_in_a_batch_equals_itself_alone(device):
    """Whatever the padding; given pairs are not looked at."""
    encoder = build(device)
    z, pos, batch, _ = demo(device)
    together = slope(encoder, z, pos, batch)
    for k in range(6):
        mine = batch == k
        zero = torch.zeros_like(batch[mine])
        pairs = radius_graph(pos[mine], zero, 1.2)
        for alone, reference in zip(slope(encoder, z[mine], pos[mine], zero, pairs), together):
            assert (alone - reference[mine]).abs().max() <= 1e-10 * reference[mine].abs().max(), k


def test_a_position_that_is_not_finite_shows(device):
    z, pos, batch = single("aspirin", device)
    pos[3, 1] = torch.nan
    x, vec = build(device)(z, pos, batch)
    assert not x.isfinite().any() and not vec.isfinite().any()


def test_vec_holds_the_coordinate_head(device):
    """update = w2 . 1/n sum_j gelu(..) (r_j - r_i) + b2 1/n sum_j (r_j - r_i): the public head, from the same sums."""
    method = objective(device)
    z, pos, batch, _ = demo(device)
    code, slot = method.encoder.encode(method.encoder.tokens(z), pos, batch)
    vec = code.weigh(method.encoder.weights(code)).flatten(0, 1)[slot]  # (N, 3, H)
    head = method.pair2coord_proj["linear2"]
    middle = code.step.masked_fill(~code.real[:, None, :, None], 0).sum(2) / code.real.sum(1)[:, None, None]
    expected = vec @ head.weight[0] + head.bias * middle.flatten(0, 1)[slot]
    assert difference(method.update(code).flatten(0, 1)[slot].detach(), expected.detach()) < 1e-10
    assert difference(method.encoder(z, pos, batch)[1].detach(), method.encoder.vec_proj(vec).detach()) < 1e-12


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["one atom", "CH4", "CO2", "acetamide"])
def test_first_and_second_derivatives_are_finite(name, dtype, device):
    """As a loss on forces needs them; and every parameter gets a gradient, as DDP needs."""
    assert name in SYMMETRIC or name == "acetamide"
    encoder = build(device, dtype)
    z, pos, batch = single(name, device)
    pos = pos.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(total(*encoder(z, pos, batch)), pos, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), [pos, *encoder.parameters()], allow_unused=True)
    assert gradient.isfinite().all()
    assert all(derivative is None or derivative.isfinite().all() for derivative in second)
    total(*encoder(z, pos, batch)).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or name != "acetamide", key


def test_the_derivative_is_that_of_central_differences(device):
    encoder = build(device)
    z, pos, batch = single("acetamide", device)
    _, _, gradient = slope(encoder, z, pos, batch)
    step = 1e-4
    for atom, axis in ((0, 0), (3, 1), (8, 2)):
        shift = torch.zeros_like(pos)
        shift[atom, axis] = step
        plus, minus = (total(*encoder(z, pos + sign * shift, batch)).item() for sign in (1, -1))
        expected = (plus - minus) / (2 * step)
        assert gradient[atom, axis].item() == pytest.approx(expected, abs=1e-6 * gradient.abs().max().item())


def test_forward_and_reverse_mode_give_one_jacobian(device):
    assert_one_jacobian(build(device), device)


def test_autocast_keeps_the_dtype_of_the_weights(device):
    encoder = build(device, torch.float32)
    z, pos, batch = single("aspirin", device)
    exact = encoder(z, pos.float(), batch)
    with torch.autocast(device.type, torch.bfloat16):
        low = encoder(z, pos.float(), batch)
    for ours, reference in zip(low, exact):
        assert ours.dtype == torch.float32
        assert 1e-5 < difference(ours.detach(), reference.detach()) < 5e-2


# ---------------------------------------------------------------- what is hidden


def test_what_is_hidden_has_its_shares(device):
    """0.15 of the atoms; of these 5 % stay, 5 % are any element, 90 % MASK; those that stay do not move."""
    counts = torch.tensor([1, 2, 9, 30, 18] * 1000, device=device)
    batch = torch.arange(len(counts), device=device).repeat_interleave(counts)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((len(batch), 7))).to(device)
    token = torch.full_like(batch, 4)
    chosen, seen, u = corrupt(token, batch, noise)
    number = torch.bincount(batch, chosen.double())
    assert ((number == (SHARE * counts).floor()) | (number == (SHARE * counts).floor() + 1)).all()
    assert chosen.double().mean().item() == pytest.approx(SHARE, abs=0.004)
    masked = seen == MASK
    assert masked[chosen].double().mean().item() == pytest.approx(0.9, abs=0.01)
    still = chosen & ~u.any(1)
    assert still[chosen].double().mean().item() == pytest.approx(0.05, abs=0.01)
    other = seen[chosen & ~masked & ~still]
    assert set(other.tolist()) == set(range(FIRST, MASK))  # each of the 26 elements
    assert torch.equal(seen[~chosen | still], token[~chosen | still]) and not u[~chosen].any()
    moved = u[chosen & ~still]
    assert moved.abs().max() <= 1 and moved.square().mean().item() == pytest.approx(1 / 3, rel=0.02)


def test_what_is_hidden_in_a_molecule_depends_on_its_own_numbers(device):
    z, pos, batch, noise = demo(device)
    together = corrupt(z, batch, noise)
    for k in range(6):
        mine = batch == k
        alone = corrupt(z[mine], torch.zeros_like(batch[mine]), noise[mine])
        assert all(torch.equal(a, b[mine]) for a, b in zip(alone, together))


def test_distances_are_those_of_the_file():
    molecules = Molecules(DEMO)
    mean, std = Distances(molecules)([0])["distances"].tolist()
    part = molecules.read(np.unique(np.linspace(0, len(molecules) - 1, 1000).astype(int)))
    i, j = radius_graph(part["pos"], part["batch"], math.inf)
    every = (part["pos"][i] - part["pos"][j]).double().norm(dim=1)
    assert mean == pytest.approx(every.mean().item(), rel=1e-5)
    assert std == pytest.approx(every.std(correction=0).item(), rel=1e-5)
    assert 2 < mean < 4 and len(Molecules(DEMO, Distances).read([3])["inputs"]["distances"]) == 2


# ---------------------------------------------------------------- the objectives


def test_the_losses_add_up_over_the_molecules(device):
    """Each molecule alone, weighted by its atoms, is the batch: parts and ranks change nothing."""
    method = objective(device, "unimol_rec", alpha=1.3)
    z, pos, batch, noise = demo(device)
    losses, added = method(z, pos, batch, noise, 6, distances=STATED.to(device)), 0
    for k in range(6):
        mine = batch == k
        part = z[mine], pos[mine], torch.zeros_like(batch[mine]), noise[mine], 1
        alone = method(*part, distances=STATED.to(device))
        added = added + torch.stack([*alone.values()]) * (len(part[0]) / len(z))
    assert difference(added.detach(), torch.stack([*losses.values()]).detach()) < 1e-12


@pytest.mark.parametrize("alpha", [1.0, 1.3])
def test_reconstruction_is_its_equation(alpha, device):
    """L + 5 w_rec rec + 5 w_clean clean, molecule by molecule, with g, another's and none."""
    method = objective(device, "unimol_rec", alpha=alpha, w_rec=0.4, w_clean=0.7, decoder_layers=2)
    z, pos, batch, noise = demo(device)
    losses = method(z, pos, batch, noise, 6, shuffle=True, distances=STATED.to(device))
    token = method.encoder.tokens(z)
    chosen, seen, u = corrupt(token, batch, noise)
    x, _ = method.encoder(z, pos, batch)
    g = torch.stack([x[batch == k].mean(0) for k in range(6)])

    def rec(g):
        found = 0
        for k in range(6):
            mine = batch == k
            moved = pos[mine] + alpha * u[mine]
            code, _ = method.encoder.encode(seen[mine], moved, torch.zeros_like(batch[mine]))
            update = method.decoder(method.encoder.invariant(code), code, g[k : k + 1])[0, 1:-1]
            error = smooth_l1_loss(moved + update, pos[mine], reduction="none")[chosen[mine]]
            found += error.sum().item() / 3
        return found / (SHARE * len(z))

    still = []
    for k in range(6):
        mine = batch == k
        code, _ = method.encoder.encode(token[mine], pos[mine], torch.zeros_like(batch[mine]))
        still.append(method.update(code)[0, 1:-1])
    still = torch.cat(still)
    clean = smooth_l1_loss(still, torch.zeros_like(still)).item()
    assert losses["loss_clean"].item() == pytest.approx(clean, rel=1e-10)
    assert losses["loss_rec"].item() == pytest.approx(rec(g), rel=1e-10)
    assert losses["loss_rec_shuffled"].item() == pytest.approx(rec(g.roll(1, 0)), rel=1e-10)
    assert abs(losses["loss_rec"] - losses["loss_rec_shuffled"]) > 1e-4  # the decoder is given g
    plain = objective(device)
    plain.load_state_dict({name: value for name, value in method.state_dict().items() if "decoder" not in name})
    plain = plain(z, pos, batch, noise, 6, distances=STATED.to(device))
    assert losses["loss_coord"].item() == pytest.approx(plain["loss_coord"].item(), rel=1e-10)
    weighed = plain["loss"].item() + 5 * (0.4 * losses["loss_rec"].item() + 0.7 * clean)
    assert losses["loss"].item() == pytest.approx(weighed, rel=1e-9)
    none = objective(device, "unimol_rec", alpha=alpha, decoder_layers=2, decoder_graph_emb=False)
    found = none(z, pos, batch, noise, 6, shuffle=True, distances=STATED.to(device))
    assert found["loss_rec"].item() == pytest.approx(rec(0 * g), rel=1e-10)
    assert found["loss_rec"] == found["loss_rec_shuffled"]


def test_a_shift_changes_no_loss_and_a_turn_those_of_coordinates_alone(device):
    """Smooth L1 is taken axis by axis: beyond 1 angstrom it depends on the axes, in the public code as here."""
    method = objective(device, "unimol_rec")
    z, pos, batch, noise = demo(device)
    noise[:, :3] = 0  # u = 0: elements are hidden, no atom is moved
    turned = pos @ random_orthogonal(0, 1).to(device).T
    here, shifted, turned = (
        method(z, at, batch, noise, 6, distances=STATED.to(device)) for at in (pos, pos + 5, turned)
    )
    for name, loss in here.items():
        assert shifted[name].item() == pytest.approx(loss.item(), rel=1e-10), name
        if name in ("loss_token", "loss_dist", "loss_x_norm", "loss_pair_norm"):
            assert turned[name].item() == pytest.approx(loss.item(), rel=1e-10), name


@pytest.mark.parametrize("number", ["some", "none"])
@pytest.mark.parametrize("name", ["unimol", "unimol_rec"])
def test_every_weight_but_one_gets_a_gradient(name, number, device):
    """Even if no atom is chosen: DDP waits for each."""
    method = objective(device, name)
    z, pos, batch, noise = demo(device)
    if number == "none":
        z, pos, batch, noise = z[:3], pos[:3], batch[:3], noise[:3]  # 0.15 of 3 atoms: one or none
        noise[:, 4] = -3
    losses = method(z, pos, batch, noise, int(batch[-1]) + 1, distances=STATED.to(device))
    assert (losses["loss_token"] == 0) == (number == "none")
    losses["loss"].backward()
    without = [key for key, parameter in method.named_parameters() if parameter.grad is None]
    assert without == ["encoder.vec_proj.weight"]
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("setting", [{"pooling": "sum"}, {"decoder_vec": False}, {"rec_target": "unit"}])
def test_a_setting_without_an_effect_is_refused(setting):
    with pytest.raises(InputError, match=f"objective = unimol_rec: {next(iter(setting))} is not for it"):
        objective("cpu", "unimol_rec", **setting)


def test_another_encoder_is_refused():
    with pytest.raises(InputError, match="model.backbone=unimol") as refused:
        UniMolPretraining(EquivariantTransformer(ModelConfig(**SMALL)), pretrain.PretrainConfig(objective="unimol"))
    assert refused.value.code == 2


# ---------------------------------------------------------------- runs


def settings(objective):
    return [f"objective={objective}", "position_noise_scale=1", "model.backbone=unimol"]


@pytest.mark.parametrize("name", ["unimol", "unimol_rec"])
def test_a_stopped_run_goes_on_to_the_same_bits(name, tiny):
    common = [str(tiny), *settings(name), "max_steps=6"]
    pretrain.main([*common, "out_dir=out/whole"])
    pretrain.main([*common, "out_dir=out/again", "max_steps=3"])
    pretrain.main([*common, "out_dir=out/again", "resume=true"])
    assert same_bits("out/whole", "out/again")
    pretrain.main([*common, "out_dir=out/parts", "accumulate=4"])
    for a, b in zip(read_log("out/whole"), read_log("out/parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert {"loss_token", "loss_coord", "loss_dist"} < a.keys() and ("loss_rec" in a) == (name == "unimol_rec")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unimol", "unimol_rec"])
def test_two_ranks_equal_one(name, tiny):
    pretrain.main([str(tiny), *settings(name), "out_dir=out/whole"])
    run(tiny, *settings(name), "out_dir=out/two", ranks=2)
    for split in ("train", "val"):
        for a, b in zip(read_log("out/whole", split), read_log("out/two", split), strict=True):
            for key in (key for key in a if key.startswith("loss")):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), (split, a["step"], key)


@pytest.mark.parametrize("name", ["coord", "georecon", "rec_only"])
def test_the_other_objectives_train_it(name, tiny):
    pretrain.main([str(tiny), f"objective={name}", "model.backbone=unimol", "max_steps=3"])
    assert type(load_encoder("out/tiny/encoder.pt")) is UniMol


def test_later_stages_take_its_encoder(tiny, capsys):
    """Properties, forces, the Lipschitz constant; from encoder.pt as from last.pt."""
    root = Path(pretrain.__file__).parent
    pretrain.main([str(tiny), *settings("unimol"), "max_steps=2"])
    model = ModelConfig(backbone="unimol")
    first, last = (read_encoder(f"out/tiny/{name}.pt", model)[0].state_dict() for name in ("encoder", "last"))
    assert all(torch.equal(value, last[name]) for name, value in first.items())
    few = ["max_steps=2", "batch_size=4", "train_size=40", "val_size=10", "test_size=10"]
    for name, data, start in (("gap", "qm9_demo", "encoder"), ("forces", "ethanol_demo", "last")):
        config = [str(root / f"configs/demo_{name}.yaml"), f"data={root}/data/{data}.h5"]
        finetune.main([*config, *few, f"init_from=out/tiny/{start}.pt", f"out_dir=out/{name}"])
        assert type(finetune.load_property_model(f"out/{name}/best.pt")[0].encoder) is UniMol
    trained = torch.load("out/gap/best.pt", weights_only=True)["state_dict"]["encoder.vec_proj.weight"]
    assert not torch.equal(trained, first["vec_proj.weight"])  # frozen in pretraining alone
    data = f"data={root}/data/qm9_demo.h5"
    lipschitz.main(["out/tiny/encoder.pt", data, "num_molecules=3", "iterations=9", "out_dir=out/llc"])
    assert json.loads(Path("out/llc/lipschitz.json").read_text())["checkpoints"]


@pytest.mark.slow
def test_compiled_layers_equal_eager_ones(tiny):
    """Layers compile; the derivative of the whole does not, and a line says so."""
    root = Path(pretrain.__file__).parent
    assert Layer.compiles
    pretrain.main([str(tiny), *settings("unimol_rec")])
    pretrain.main([str(tiny), *settings("unimol_rec"), "compile=true", "out_dir=out/compiled"])
    for a, b in zip(read_log("out/tiny"), read_log("out/compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    forces = [str(root / "configs/demo_forces.yaml"), f"data={root / 'data/ethanol_demo.h5'}", "max_steps=2"]
    with pytest.raises(InputError, match="cannot be compiled: set compile=false"):
        finetune.main([*forces, "init_from=out/tiny/encoder.pt", "compile=true", "out_dir=out/forces"])
    assert not Path("out/forces").exists()

"""beyond/painn.py: equal to schnetpack, equivariant, with the derivatives and gradients that training needs."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from make_parity import MOLECULES, collate
from make_parity_painn import FULL, PATH, SETTINGS
from symmetries import check_order, check_turned, slope, total
from test_model import (
    DTYPES,
    SYMMETRIC,
    all_molecules,
    assert_one_jacobian,
    difference,
    fill,
    single,
)
from tiny_run import same_bits

import finetune
import lipschitz
import pretrain
from beyond.painn import GaussianSmearing, PaiNN
from harness.errors import InputError
from model import ModelConfig, cosine_cutoff, load_encoder, radius_graph


def build(device, dtype=torch.float64, **changes):
    """A small PaiNN with random weights and biases."""
    config = ModelConfig(**dict(embedding_dimension=16, num_layers=3, num_rbf=8, num_heads=4) | changes)
    return fill(PaiNN(config)).to(device, dtype)


# ---------------------------------------------------------------- parity with schnetpack


@pytest.fixture(scope="module")
def parity():
    with np.load(PATH) as file:
        return dict(file)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_painn_equals_schnetpack(parity, setting, dtype, device):
    """x, vec and a derivative: for each molecule on the scale of its own numbers, not of the largest one's."""
    encoder = build(device, dtype, **SETTINGS[setting])
    z, pos, batch = (part.to(device) for part in collate(MOLECULES))
    exact = dtype == torch.float64
    tolerance = {key: 1e-10 if exact else rough for key, rough in dict(x=1e-5, vec=1e-5, slope=1e-3).items()}
    ours = dict(zip(("x", "vec", "slope"), slope(encoder, z, pos.to(dtype), batch)))
    assert {value.dtype for value in ours.values()} == {dtype}
    for k, name in enumerate(MOLECULES):
        mine = (batch == k).cpu()
        for key, value in ours.items():
            reference = parity[f"{setting}/{key}"][mine]
            if name == "argon" and key != "x":
                assert not value[mine].any() and not reference.any()
            else:
                assert difference(value[mine], reference) < tolerance[key], (name, key)


@pytest.mark.parametrize("setting", SETTINGS)
def test_buffers_equal_schnetpacks(parity, setting):
    for name, value in PaiNN(ModelConfig(**SETTINGS[setting])).named_buffers():
        assert difference(value, parity[f"{setting}/{name}"]) < 1e-7, name


def test_a_schnetpack_state_dict_loads_by_name(parity):
    theirs = {name: torch.rand(shape) for name, shape in json.loads(parity["state_dict_128_3_20"].tobytes()).items()}
    encoder = PaiNN(ModelConfig(**FULL))
    encoder.load_state_dict(theirs)  # strict: names and shapes are the same
    assert all(torch.equal(value, theirs[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "layers", "rbf", "max_z", "count"),
    [(128, 3, 20, 100, 580_736), (64, 3, 20, 100, 155_200), (64, 4, 32, 100, 214_016), (64, 4, 32, 20, 208_896)],
)
def test_parameter_counts(channels, layers, rbf, max_z, count):
    encoder = PaiNN(ModelConfig(embedding_dimension=channels, num_layers=layers, num_rbf=rbf, max_z=max_z))
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_it_starts_as_schnetpack_does():
    """Xavier uniform weights, zero biases, a normal embedding."""
    torch.manual_seed(0)
    for name, value in PaiNN(ModelConfig(**FULL)).named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name == "embedding.weight":
            assert value.std().item() == pytest.approx(1, rel=0.05)
        else:
            limit = math.sqrt(6 / sum(value.shape))
            assert 0.99 * limit < value.abs().max().item() <= limit, name
            assert value.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05), name


# ---------------------------------------------------------------- the equations, written again


def test_one_layer_is_what_its_equations_say(device):
    """A double loop over directed pairs, from the docstrings; mu starts at random here, not at zero."""
    encoder = build(device, num_layers=1)
    weights = {name: value.detach() for name, value in encoder.state_dict().items()}
    z, pos, batch = single("water", device)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 16, dtype=torch.float64, generator=generator).to(device)
    mu = torch.randn(3, 3, 16, dtype=torch.float64, generator=generator).to(device)

    def dense(name, value):
        return weights[f"{name}.weight"] @ value + weights[f"{name}.bias"]

    def net(name, value):
        hidden = dense(f"{name}.0", value)
        return dense(f"{name}.1", hidden / (1 + torch.exp(-hidden))).split(16)

    expected_q, expected_mu = q.clone(), mu.clone()
    for i in range(3):
        for j in range(3):
            if i != j:
                distance = (pos[j] - pos[i]).norm()
                step = weights["radial_basis.offsets"][1]
                gaussians = torch.exp(-((distance - weights["radial_basis.offsets"]) ** 2) / (2 * step**2))
                fade = (torch.cos(math.pi * distance / 5) + 1) / 2
                filters = (dense("filter_net", gaussians) * fade).split(16)
                s = net("interactions.0.interatomic_context_net", q[j])
                a, b, e = (w * part for w, part in zip(filters, s))
                expected_q[i] += a
                expected_mu[i] += (pos[j] - pos[i])[:, None] / distance * b + mu[j] * e
    for i in range(3):
        v, u = (expected_mu[i] @ weights["mixing.0.mu_channel_mix.weight"].T).split(16, dim=1)
        both = torch.cat([expected_q[i], (v.square().sum(0) + 1e-8).sqrt()])
        a, b, e = net("mixing.0.intraatomic_context_net", both)
        expected_q[i] += a + e * (v * u).sum(0)
        expected_mu[i] += b * u

    captured = []
    hook = encoder.interactions[0].register_forward_hook(lambda module, arguments, out: captured.extend(arguments[2:]))
    encoder(z, pos, batch)
    hook.remove()
    found_q, found_mu = encoder.mixing[0](*encoder.interactions[0](q, mu, *captured))
    assert difference(found_q.detach(), expected_q) < 1e-12
    assert difference(found_mu.detach(), expected_mu) < 1e-12


def test_gaussians_are_one_at_their_centres_a_width_apart(device):
    smearing = GaussianSmearing(4.0, 5).double().to(device)
    values = smearing(torch.arange(5, dtype=torch.float64, device=device))
    assert torch.equal(values.diagonal(), torch.ones(5, dtype=torch.float64, device=device))
    assert values[0, 1].item() == pytest.approx(math.exp(-0.5))


# ---------------------------------------------------------------- symmetries


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_equivariance(determinant, device):
    """Generic and exactly symmetric molecules, each on the scale of its own numbers; a shift changes nothing."""
    check_turned(build(device), *all_molecules(device), determinant)


def test_symmetry_forces_the_vectors_of_some_atoms_to_zero(device):
    encoder = build(device)
    for name, atom in (("one atom", 0), ("CH4", 0), ("SF6", 0), ("CO2", 1)):
        _, vec = encoder(*single(name, device))
        assert vec[atom].abs().max() < 1e-12, name
        assert len(vec) == 1 or vec.abs().max() > 1e-2, name


def test_the_order_of_the_atoms_does_not_matter(device):
    check_order(build(device), *all_molecules(device))


def test_a_molecule_in_a_batch_equals_itself_alone(device):
    encoder = build(device)
    z, pos, batch = collate(MOLECULES)
    z, pos, batch = z.to(device), pos.to(device), batch.to(device)
    together = slope(encoder, z, pos, batch)
    for k, name in enumerate(MOLECULES):
        for alone, reference in zip(slope(encoder, *single(name, device)), together):
            reference = reference[batch == k]
            assert (alone - reference).abs().max() <= 1e-10 * reference.abs().max(), name


# ---------------------------------------------------------------- pairs


def test_pairs_beyond_the_cutoff_have_no_weight(device):
    """Values, gradients and second gradients are those without them. A missing pair would show."""
    z, pos, batch = (tensor.to(device) for tensor in collate(["aspirin", "dissociated", "argon"]))
    encoder = build(device)
    near = radius_graph(pos, batch, 5.0)
    everything = radius_graph(pos, batch, 100.0)
    assert everything.shape[1] > near.shape[1]
    found = []
    for edge_index in (None, near, everything, near[:, 1:]):
        pos = pos.detach().requires_grad_()
        encoder.zero_grad()
        x, vec = encoder(z, pos, batch, edge_index)
        (gradient,) = torch.autograd.grad(total(x, vec), pos, create_graph=True)
        gradient.square().sum().backward()
        gradients = [p.grad.clone() for p in encoder.parameters()]
        found.append([x.detach(), vec.detach(), gradient.detach(), pos.grad, *gradients])
    reference, *same, other = found
    for values in same:
        for a, b in zip(values, reference, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())
    assert difference(other[0], reference[0]) > 1e-6


def test_all_is_smooth_at_the_cutoff(device):
    """No jump of x, vec or the slope where a pair leaves: its filter fades as the square of the distance from there."""
    encoder = build(device)
    z, batch = torch.tensor([6, 1, 8], device=device), torch.zeros(3, dtype=torch.int64, device=device)

    def at(gap):
        pos = [[0, 0, 0], [1.1, 0.3, 0], [5 + gap, 0, 0]]
        return slope(encoder, z, torch.tensor(pos, dtype=torch.float64, device=device), batch)

    for inside, outside, further in zip(at(-1e-7), at(1e-7), at(-1.0)):
        assert (inside - outside).abs().max() < 1e-5
        assert (inside - further).abs().max() > 1e-3
    assert not cosine_cutoff(torch.tensor([5.0, 5.1, 60.0], device=device), 5.0).any()


def test_a_position_that_is_not_finite_shows(device):
    z, pos, batch = single("aspirin", device)
    pos[3, 1] = torch.nan
    x, vec = build(device)(z, pos, batch)
    assert not x.isfinite().any() and not vec.isfinite().any()


def test_max_num_neighbors_is_kept(device):
    with pytest.raises(ValueError, match="max_num_neighbors = 3"):
        build(device, max_num_neighbors=3)(*single("benzene", device))


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["acetamide", "one atom", "CH4"])
def test_every_parameter_gets_a_gradient(name, device):
    """DDP waits for one in every step. With several atoms none is zero, but for the elements that are not there."""
    encoder = build(device)
    z, pos, batch = single(name, device)
    total(*encoder(z, pos, batch)).backward()
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or name == "one atom", key
    rows = encoder.embedding.weight.grad.any(1).nonzero().flatten()
    assert torch.equal(rows, z.unique())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SYMMETRIC, "acetamide"])
def test_first_and_second_derivatives_are_finite(name, dtype, device):
    """As a loss on forces needs them."""
    encoder = build(device, dtype)
    z, pos, batch = single(name, device)
    pos = pos.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(total(*encoder(z, pos, batch)), pos, create_graph=True)
    assert gradient.isfinite().all()
    second = torch.autograd.grad(gradient.square().sum(), [pos, *encoder.parameters()], allow_unused=True)
    assert all(derivative is None or derivative.isfinite().all() for derivative in second)
    assert second[0].any() or name in ("one atom", "two far atoms")


def test_values_and_derivatives_of_coincident_atoms_are_finite(device):
    pos = torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 0, 0]], dtype=torch.float64, device=device)
    z, batch = torch.tensor([6, 6, 1], device=device), torch.zeros(3, dtype=torch.int64, device=device)
    assert all(value.isfinite().all() for value in slope(build(device), z, pos, batch))


def test_the_derivative_is_that_of_central_differences(device):
    encoder = build(device)
    z, pos, batch = single("acetamide", device)
    _, _, gradient = slope(encoder, z, pos, batch)
    step = 1e-4
    for atom in (0, 3, 8):
        for axis in range(3):
            shift = torch.zeros_like(pos)
            shift[atom, axis] = step
            plus, minus = (total(*encoder(z, pos + sign * shift, batch)).item() for sign in (1, -1))
            expected = (plus - minus) / (2 * step)
            assert gradient[atom, axis].item() == pytest.approx(expected, abs=1e-6 * gradient.abs().max().item())


def test_forward_and_reverse_mode_give_one_jacobian(device):
    """The Lipschitz analysis needs both."""
    assert_one_jacobian(build(device), device)


# ---------------------------------------------------------------- precision, compiling


def test_autocast_keeps_the_dtype_of_the_weights(device):
    encoder = build(device, torch.float32)
    z, pos, batch = single("aspirin", device)
    exact = encoder(z, pos.float(), batch)
    with torch.autocast(device.type, torch.bfloat16):
        low = encoder(z, pos.float(), batch)
    for ours, reference in zip(low, exact):
        assert ours.dtype == torch.float32
        assert 1e-5 < difference(ours.detach(), reference.detach()) < 5e-2


def test_the_layers_say_that_compiling_pays(device):
    encoder = build(device)
    marked = [name for name, module in encoder.named_modules() if getattr(module, "compiles", False)]
    assert marked == [f"{kind}.{layer}" for kind in ("interactions", "mixing") for layer in range(3)]


COMPILED = ("acetamide", "aspirin", "CH4", "one atom")  # several sizes, and no pair at all


@pytest.mark.parametrize("backbone", ["painn", "unimol"])
@pytest.mark.parametrize("setting", ["vec_norm_layer=whiten", "x_norm_layer=false"])
def test_a_norm_that_it_does_not_have_is_refused(backbone, setting, tiny):
    """It would be an ablation without an effect."""
    with pytest.raises(InputError, match=f"model.{setting.partition('=')[0]} = .* has no such part") as caught:
        pretrain.main([str(tiny), f"model.backbone={backbone}", f"model.{setting}"])
    assert caught.value.code == 2 and not Path("out").exists()


@pytest.mark.parametrize("objective", ["coord", "georecon"])
def test_every_stage_runs_on_it(objective, tiny):
    """Pretraining, resumed to the same bits; properties, forces, the Lipschitz constant."""
    root = Path(pretrain.__file__).parent
    settings = [str(tiny), f"objective={objective}", "model.backbone=painn"]
    pretrain.main([*settings, "max_steps=6", "out_dir=out/whole"])
    pretrain.main([*settings, "max_steps=3", "out_dir=out/again"])
    pretrain.main([*settings, "max_steps=6", "out_dir=out/again", "resume=true"])
    assert same_bits("out/whole", "out/again") and type(load_encoder("out/whole/encoder.pt")) is PaiNN
    few = ["init_from=out/whole/encoder.pt", "max_steps=3", "batch_size=4"]
    few += ["train_size=40", "val_size=10", "test_size=10"]
    for name, data in (("gap", "qm9_demo"), ("forces", "ethanol_demo")):
        config = str(root / f"configs/demo_{name}.yaml")
        finetune.main([config, f"data={root}/data/{data}.h5", *few, f"out_dir=out/{name}"])
        assert type(finetune.load_property_model(f"out/{name}/best.pt")[0].encoder) is PaiNN
    data = f"data={root}/data/qm9_demo.h5"
    lipschitz.main(["out/whole/encoder.pt", data, "num_molecules=3", "iterations=9", "out_dir=out/llc"])


@pytest.mark.slow
def test_compiled_layers_equal_eager_ones(device):
    eager, compiled = build(device, num_layers=2), build(device, num_layers=2)
    for module in compiled.modules():
        if getattr(module, "compiles", False):
            module.compile(dynamic=True, fullgraph=True)
    for name in COMPILED:
        inputs = single(name, device)
        for ours, reference in zip(slope(compiled, *inputs), slope(eager, *inputs)):
            assert (ours - reference).abs().max() <= 1e-10 * reference.abs().max(), name
    for model in (eager, compiled):
        model.zero_grad()
        total(*model(*single("aspirin", device))).backward()
    for (name, p), q in zip(eager.named_parameters(), compiled.parameters()):
        assert difference(q.grad, p.grad) < 1e-10, name


@pytest.mark.slow
def test_a_compiled_derivative_equals_the_eager_one(device):
    """As fine-tuning on forces compiles it: the whole forward and torch.func.grad in one graph, for all sizes."""
    encoder = build(device, num_layers=2)

    def gradient(pos, z, batch, edge_index):
        return torch.func.grad(lambda pos: total(*encoder(z, pos, batch, edge_index)))(pos)

    compiled = torch.compile(gradient, fullgraph=True, dynamic=True)
    for name in COMPILED[:3]:
        z, pos, batch = single(name, device)
        edge_index = radius_graph(pos, batch, 5.0)
        found = []
        for function in (compiled, gradient):
            encoder.zero_grad()
            value = function(pos, z, batch, edge_index)
            value.square().sum().backward()
            found.append([value.detach(), *[p.grad.clone() for p in encoder.parameters()]])
        for ours, reference in zip(*found, strict=True):
            assert difference(ours, reference) < 1e-9, name
        assert difference(found[0][0], slope(encoder, z, pos, batch)[2]) < 1e-9

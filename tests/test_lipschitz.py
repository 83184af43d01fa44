"""The Jacobian's norm and its invariances, against what is known by other means."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lipschitz
from data import Molecules
from formats.weights import read_encoder
from harness.errors import InputError
from lipschitz import LipschitzConfig, constants, embed, measure, output, rigid_motions, spectral_norms
from model import EquivariantTransformer, ModelConfig, radius_graph, save_encoder

ROOT = Path(__file__).parent.parent
QM9 = str(ROOT / "data/qm9_demo.h5")
SMALL = {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4}
CONFIG = LipschitzConfig(data=QM9)


def encoder(**changes):
    torch.manual_seed(0)
    return EquivariantTransformer(ModelConfig(**SMALL | changes)).double().eval().requires_grad_(False)


def spread(num):
    """Molecules of the demo file from the smallest to the largest: indices."""
    order = np.argsort(np.diff(Molecules(QM9).ptr), kind="stable")
    return order[np.linspace(0, len(order) - 1, num).astype(int)]


def batch_of(*molecules):
    """(z, pos) of each -> z, pos, batch, num_molecules, directions."""
    z = torch.cat([torch.tensor(z) for z, _ in molecules])
    pos = torch.cat([torch.tensor(pos, dtype=torch.float64) for _, pos in molecules])
    batch = torch.cat([torch.full((len(z),), m) for m, (z, _) in enumerate(molecules)])
    directions = torch.randn(pos.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z, pos, batch, len(molecules), directions


WATER = ([8, 1, 1], [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])
ACETYLENE = ([6, 6, 1, 1], [[0, 0, 0.601], [0, 0, -0.601], [0, 0, 1.665], [0, 0, -1.665]])
HYDROGEN_CYANIDE = ([1, 6, 7], [[0, 0, -1.065], [0, 0, 0], [0, 0, 1.156]])
ATOM = ([2], [[1.0, 2.0, 3.0]])


def test_rigid_motions_have_the_right_rank_and_are_orthonormal():
    _, pos, batch, num, _ = batch_of(WATER, ACETYLENE, ATOM)
    motions = rigid_motions(pos, batch, num)
    for m, rank in enumerate((6, 5, 3)):
        gram = torch.einsum("nak,nal->kl", motions[batch == m], motions[batch == m])
        assert torch.allclose(gram, torch.diag((torch.arange(6) < rank).double()), atol=1e-12)
    # they are what they are called: a translation and a rotation lie in their span
    for molecule in range(num):
        r = pos[batch == molecule]
        for motion in (torch.ones_like(r), torch.linalg.cross(torch.tensor([[0.3, -1, 2]]).double().expand_as(r), r)):
            rest = lipschitz.remove(motions[batch == molecule], motion, torch.zeros(len(r), dtype=torch.long), 1)
            assert rest.abs().max() < 1e-12


@pytest.mark.parametrize("norms", [{}, {"vec_norm_layer": "none"}], ids=str)
def test_an_invariant_embedding_does_not_answer_to_rigid_motions(norms):
    z, pos, batch, num, _ = batch_of(WATER, ACETYLENE)
    pos.requires_grad_()
    jvp, _ = lipschitz.jacobian_products(output("graph", encoder(**norms), z, pos, batch, num)[0], pos)
    motions = rigid_motions(pos.detach(), batch, num)
    assert max(jvp(motions[:, :, k]).abs().max() for k in range(6)) < 1e-12
    assert jvp(torch.randn_like(pos)).abs().max() > 1e-3


def test_a_linear_map_gives_its_spectral_norm():
    """h = A pos of each molecule with a spectrum chosen: well separated, degenerate at the top, and zero."""
    size, F = 5, 12
    generator = torch.Generator().manual_seed(0)
    spectra = torch.zeros(3, F, dtype=torch.float64)
    spectra[0] = torch.linspace(3, 0.1, F)
    spectra[1, :4] = torch.tensor([7.0, 7.0, 6.99, 6.98])
    U = torch.linalg.qr(torch.randn(3, F, F, dtype=torch.float64, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(3, 3 * size, F, dtype=torch.float64, generator=generator))[0]
    A = U @ torch.diag_embed(spectra) @ V.mT  # (3, F, 3 n)
    batch = torch.arange(3).repeat_interleave(size)
    pos = torch.randn(3 * size, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    h = torch.einsum("bfk,bk->bf", A, pos.view(3, -1))
    jvp, vjp = lipschitz.jacobian_products(h, pos)
    scale = torch.ones(F, dtype=torch.float64)
    start = torch.randn(pos.shape, dtype=torch.float64, generator=generator)
    rows = torch.arange(3)
    found = spectral_norms(jvp, vjp, lambda v: v, start, batch, rows, scale, (5, 25))
    assert torch.allclose(found[25], torch.tensor([3.0, 7.0, 0.0], dtype=torch.float64), rtol=1e-9)
    assert (found[5] <= found[25] + 1e-9).all()  # from below
    halved = spectral_norms(jvp, vjp, lambda v: v, start, batch, rows, 2 * scale, (25,))
    assert torch.allclose(halved[25], found[25] / 2)


def exact_norms(of, encoder, part, std):
    """|J P|_2 from the whole Jacobian, column by column, one molecule after another -> (B, 2), of h and of h / std."""
    z, pos, batch, num_molecules, _ = part
    found = []
    for molecule in range(num_molecules):
        mask = batch == molecule
        z_m, pos_m, batch_m = z[mask], pos[mask], torch.zeros_like(z[mask])
        motions = rigid_motions(pos_m, batch_m, 1).flatten(0, 1)  # (3 n, 6)
        edge_index = radius_graph(pos_m, batch_m, encoder.config.cutoff_upper)

        def h(pos, z_m=z_m, batch_m=batch_m, edge_index=edge_index):
            x, vec = encoder(z_m, pos, batch_m, edge_index)
            return {"graph": x.mean(0, keepdim=True), "atoms": x}.get(of, torch.cat([x, vec.flatten(1)], dim=1))

        unit = torch.eye(pos_m.numel(), dtype=pos.dtype).view(-1, *pos_m.shape)
        J = torch.stack([torch.func.jvp(h, (pos_m,), (v,))[1] for v in unit], dim=2)  # (R, C, 3 n)
        J = J - J @ motions @ motions.T
        scale = (torch.ones_like(std), std)
        found.append(torch.stack([torch.linalg.matrix_norm((J / s.unsqueeze(1)).flatten(0, 1), 2) for s in scale]))
    return torch.stack(found)


def agreement(encoder, index):
    """Largest relative error of the batched norms after 25 iterations against the exact ones."""
    (part,) = lipschitz.batches(Molecules(QM9), index, CONFIG, "cpu")
    std = embed("graph", encoder, [part])[0].std(0)
    iterated = constants(encoder, part, std, CONFIG)[25]
    return (iterated / exact_norms("graph", encoder, part, std) - 1).abs().max()


@pytest.mark.parametrize("norms", [{}, {"vec_norm_out": "whiten", "vec_norm_layer": "none"}], ids=str)
def test_iterated_norms_equal_the_exact_ones(norms):
    assert agreement(encoder(**norms), spread(4)[:3]) < 1e-6


@pytest.mark.parametrize("of", ["atoms", "all"])
def test_the_output_of_all_atoms(of):
    """Iterated equals exact, exact equals a Jacobian by autograd of all rows as one vector; vec adds to x."""
    part, config = batch_of(WATER, HYDROGEN_CYANIDE), replace(CONFIG, of=of)
    network, (z, pos, batch, num, _) = encoder(), part
    ones = torch.ones(output(of, *[network, z, pos, batch, num])[0].shape[1], dtype=torch.float64)
    exact = exact_norms(of, network, part, ones)[:, 0]
    assert torch.allclose(constants(network, part, ones, config)[25][:, 0], exact, rtol=1e-9)
    for molecule in range(num):
        mask = batch == molecule
        zero = torch.zeros_like(z[mask])

        def rows(moved, mask=mask, zero=zero):
            x, vec = network(z[mask], moved, zero)
            return torch.cat([x.flatten(), vec.flatten() if of == "all" else vec.flatten()[:0]])

        J = torch.autograd.functional.jacobian(rows, pos[mask]).flatten(1)  # (n F or 4 n F, 3 n)
        Q = rigid_motions(pos[mask], zero, 1).flatten(0, 1)
        norm = torch.linalg.matrix_norm(J - J @ Q @ Q.T, 2)
        assert exact[molecule].item() == pytest.approx(norm.item(), rel=1e-9)
    assert (exact > constants(network, part, ones[:16], CONFIG)[25][:, 0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coord", "georecon"])
def test_iterated_norms_equal_the_exact_ones_of_trained_encoders(name):
    """Four minutes each: 50 molecules of 4 to 29 atoms, column by column."""
    trained, _ = read_encoder(str(ROOT / f"results/encoders/{name}_s1.pt"), ModelConfig())
    assert agreement(trained.double().requires_grad_(False), spread(50)) < 1e-3


def test_iterated_norms_equal_the_exact_ones_of_a_trained_encoder_on_small_molecules():
    trained, _ = read_encoder(str(ROOT / "results/encoders/georecon_s1.pt"), ModelConfig())
    smallest = np.argsort(np.diff(Molecules(QM9).ptr), kind="stable")[:3]
    part, ones = batch_of(WATER, HYDROGEN_CYANIDE, *real(smallest)), torch.ones(64, dtype=torch.float64)
    trained = trained.double().requires_grad_(False)
    exact = exact_norms("graph", trained, part, ones)
    assert torch.allclose(constants(trained, part, ones, CONFIG)[25], exact, rtol=1e-9, atol=0)


def test_the_smallest_molecules():
    """Three atoms have 3 directions, fewer than the iterations; one atom has none."""
    part = batch_of(WATER, ACETYLENE, ATOM)
    found = constants(encoder(), part, torch.ones(16, dtype=torch.float64), CONFIG)[25][:, 0]
    exact = exact_norms("graph", encoder(), part, torch.ones(16, dtype=torch.float64))[:, 0]
    assert torch.allclose(found, exact, rtol=1e-9) and found[2] == 0 and (found[:2] > 1e-3).all()


NORMS = {
    "public": {"x_norm_layer": False, "vec_norm_layer": "none", "vec_norm_out": "whiten"},
    "rms": {},
    "whiten": {"vec_norm_layer": "whiten", "vec_norm_out": "whiten"},
}


def real(index):
    """(z, pos) of molecules of the demo file."""
    read = [Molecules(QM9).read([m]) for m in index]
    return [(arrays["z"].tolist(), arrays["pos"].tolist()) for arrays in read]


@pytest.mark.parametrize("norms", NORMS)
def test_turning_moving_and_renumbering_a_molecule_change_nothing(norms):
    """Nor does the direction that the iteration starts from: it has converged."""
    part = z, pos, batch, num, _ = batch_of(WATER, ACETYLENE, *real(spread(6)))
    generator, ones = torch.Generator().manual_seed(1), torch.ones(16, dtype=torch.float64)
    expected = constants(encoder(**NORMS[norms]), part, ones, CONFIG)[25]
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    order = torch.argsort(batch + 0.9 * torch.rand(len(z), generator=generator))  # within each molecule
    moved = (pos @ rotation.T + torch.tensor([3.0, -7, 1]))[order]
    other = torch.randn(pos.shape, dtype=torch.float64, generator=generator)
    found = constants(encoder(**NORMS[norms]), (z[order], moved, batch, num, other), ones, CONFIG)[25]
    assert torch.allclose(found, expected, rtol=1e-11, atol=0)


def test_molecules_that_do_not_differ_and_numbers_that_are_none():
    """No channel varies: nothing to standardise by. A molecule whose embedding is none spoils no other's figure."""
    index = np.array([7, 7, 7])
    same = measure(encoder(), Molecules(QM9), index, replace(CONFIG, iterations=(5,)), "cpu")
    assert np.allclose(same["llc_standardised"], 0) and np.all(np.array(same["llc"]["5"]) > 0)
    z, pos, batch, num, directions = batch_of(WATER, ACETYLENE)
    spoilt = encoder()
    spoilt.embedding.weight[6] = torch.nan
    found = constants(spoilt, (z, pos, batch, num, directions), torch.ones(16).double(), CONFIG)[25][:, 0]
    whole = constants(encoder(), (z, pos, batch, num, directions), torch.ones(16).double(), CONFIG)[25][:, 0]
    assert found[1].isnan() and found[0] == pytest.approx(whole[0].item())
    assert lipschitz.quantiles(found.tolist())["not_finite"] == 1
    without = encoder()
    without.embedding.weight[7] = torch.nan  # nitrogen
    index = spread(8)
    found = measure(without, Molecules(QM9), index, replace(CONFIG, iterations=(5,)), "cpu")
    standardised = np.array(found["llc_standardised"])
    has_none = np.isnan(standardised)
    assert 0 < has_none.sum() < 8 and (standardised[~has_none] > 0).all()
    assert np.isfinite(lipschitz.summarise(found)["sensitivity"]).all()


def test_figures_do_not_depend_on_the_batch_and_know_the_scale():
    index = spread(6)
    one = measure(encoder(), Molecules(QM9), index, replace(CONFIG, iterations=(15,)), "cpu")
    parts = measure(encoder(), Molecules(QM9), index, replace(CONFIG, iterations=(15,), batch_size=2), "cpu")
    for name in ("llc_by_norm", "llc_standardised", "norm", "sensitivity"):
        assert np.allclose(one[name], parts[name], rtol=1e-8), name
    # a gain of the last LayerNorm is seen by the plain figure and by no other
    loud = encoder()
    loud.out_norm.weight.data *= 10
    found = measure(loud, Molecules(QM9), index, replace(CONFIG, iterations=(15,)), "cpu")
    assert np.allclose(found["llc"]["15"], 10 * np.array(one["llc"]["15"]))
    for name in ("llc_by_norm", "llc_standardised"):
        assert np.allclose(found[name], one[name]), name
    # Fig. 2 starts as the Jacobian says it must: no direction is steeper than the LLC
    first = np.array(one["sensitivity"])[:, 1] / lipschitz.DISPLACEMENTS[1]
    assert (first <= 1.02 * np.array(one["llc"]["15"])).all() and (first > 0).all()


# ---------------------------------------------------------------- the programs


def test_table_1_and_figure_2(runs, tmp_path, capsys):
    names = [str(runs / "georecon" / f"{name}.pt") for name in ("step_0", "step_2", "encoder")]
    lipschitz.main([*names, str(runs / "coord/last.pt"), f"data={QM9}", "num_molecules=7", f"out_dir={tmp_path}/a"])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "a/lipschitz.json").read_text())
    assert set(found["checkpoints"]) == {"georecon/step_0", "georecon/step_2", "georecon/encoder", "coord/last"}
    assert all(name in said for name in found["checkpoints"]) and "median 25" in said
    for of in found["checkpoints"].values():
        assert len(of["llc"]["25"]) == 7 and np.isfinite(of["sensitivity"]).all()
    assert found["summary"]["coord/last"]["llc"]["median"] == np.median(found["checkpoints"]["coord/last"]["llc"]["25"])
    assert found["commit"] is None or isinstance(found["commit"], str)
    for kind in ("png", "svg"):
        assert (tmp_path / f"a/lipschitz.{kind}").stat().st_size > 5000
    with pytest.raises(InputError, match="exists"):
        lipschitz.main([*names, f"out_dir={tmp_path}/a"])


def test_the_architecture_of_a_bare_state_dict_is_said(runs, tmp_path):
    content = torch.load(runs / "georecon/encoder.pt", weights_only=True)
    torch.save({f"representation_model.{k}": v for k, v in content["state_dict"].items()}, tmp_path / "theirs.pt")
    paths, few = [str(tmp_path / "theirs.pt"), str(runs / "georecon/encoder.pt")], [f"data={QM9}", "num_molecules=2"]
    lipschitz.main([*paths, *few, f"out_dir={tmp_path}", *(f"model.{key}={value}" for key, value in SMALL.items())])
    theirs, ours = json.loads((tmp_path / "lipschitz.json").read_text())["checkpoints"].values()
    if torch.cuda.is_available():  # sums on a GPU are equal to rounding
        theirs, ours = (np.hstack([*one.pop("llc").values(), *map(np.ravel, one.values())]) for one in (theirs, ours))
        np.testing.assert_allclose(theirs, ours, rtol=1e-12, atol=1e-12)
    else:
        assert theirs == ours
    with pytest.raises(InputError, match="not of this encoder"):
        lipschitz.main([*paths, *few, f"out_dir={tmp_path}/other"])


def test_geometries_may_be_noised(runs, tmp_path):
    for name, more in (("clean", []), ("noised", ["position_noise_scale=0.04"])):
        lipschitz.main(
            [str(runs / "georecon/last.pt"), f"data={QM9}", "num_molecules=2", f"out_dir={tmp_path}/{name}", *more]
        )
    clean, noised = (
        json.loads((tmp_path / name / "lipschitz.json").read_text())["checkpoints"].popitem()[1]
        for name in ("clean", "noised")
    )
    assert not np.allclose(clean["llc"]["25"], noised["llc"]["25"], rtol=1e-3)


def scaled(path, factor, out):
    """A copy of a checkpoint, every weight times factor; the radial functions are no weights."""
    content = torch.load(path, weights_only=True)
    kept = ("means", "betas")
    weights = {k: v if k.endswith(kept) else v * factor for k, v in content["state_dict"].items()}
    torch.save({**content, "state_dict": weights}, out)
    return str(out)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_figures_that_are_not_finite_are_null(runs, tmp_path):
    huge = scaled(runs / "georecon/last.pt", 1e30, tmp_path / "huge.pt")
    few = [f"data={QM9}", "num_molecules=2"]
    lipschitz.main([huge, *few, f"out_dir={tmp_path}/huge"])
    text = (tmp_path / "huge/lipschitz.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)["summary"].popitem()[1]
    assert found["llc"] == {"median": None, "p95": None, "max": None, "not_finite": 2}
    assert set(found["sensitivity"]) == {None}


def test_columns_do_not_touch():
    found = {"llc": {"25": [1.0]}, "llc_by_norm": [1.0], "llc_standardised": [1.0]}
    head, row = lipschitz.table({"last": found})
    assert "standardised" in head and len(head) == len(row)


BAD = [
    (["data=x.h5"], "name one"),
    (["nothing.pt"], "nothing.pt"),
    (["E", "E"], "twice"),
    (["E", "iterations=0"], "at least 1"),
    (["E", "iteration=5"], "did you mean iterations"),
    (["E", "num_molecules=5000"], "there are 2000"),
    (["E", "split=west"], "no such split"),
    (["E", "data=nothing.h5"], "nothing.h5"),
    (["broken"], "no torch file"),
    (["E", "iterations="], "iterations is empty"),
    (["E", "./E"], "cannot be told apart"),
    (["E", "out_dir=broken"], "broken cannot be made or written to"),
    (["small", "num_molecules=50"], "holds atomic number 9, model.max_z = 8"),
    ([""], "'' is no file"),
    (["E", "."], "'.' is no file"),
    (["/"], "'/' is no file"),
    (["E", "out_dir=new/broken/../../broken/a"], "cannot be made or written to"),
    (["E", "out_dir=drawn"], "lipschitz.svg exists"),
    (["E", "position_noise_scale=1e308"], "must be below 10"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=str)
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(save_encoder(encoder().float()), "E")
    torch.save(save_encoder(encoder(max_z=8).float()), "small")
    Path("broken").write_bytes(b"PK\x03\x04 cut off")
    Path("drawn").mkdir()
    Path("drawn/lipschitz.svg").symlink_to("nowhere")
    before = sorted(os.listdir())
    given = arguments if any("data=" in a for a in arguments) else [*arguments, f"data={QM9}"]
    with pytest.raises(InputError, match=words):
        lipschitz.main(given)
    assert sorted(os.listdir()) == before


def test_the_default_is_what_readmes_minute_is_for():
    assert asdict(CONFIG)["num_molecules"] == 100

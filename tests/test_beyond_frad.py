"""beyond/frad.py and beyond/rotors.py: torsions against RDKit, Coord's bits, the file and what is refused of it."""

import gzip
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml
from raw_files import tar
from tiny_run import TINY, read_log, run, same_bits
from torch.utils.data import DataLoader

import data
import pretrain
from beyond.frad import Frad, turn
from beyond.join import sample
from data import Molecules
from formats.write import write_h5
from harness.errors import InputError
from model import EquivariantTransformer, ModelConfig
from pretrain import Pretraining

Chem = pytest.importorskip("rdkit.Chem")
from rdkit.Chem import AllChem  # noqa: E402
from rdkit.Chem import rdMolTransforms as geometry  # noqa: E402

from beyond.rotors import add_rotors, from_geometry, rotors  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "data" / "qm9_demo.h5"
DRUGS = {  # ids of the molecules of a file; the title of each in its SDF
    101: "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
    102: "CC(=O)Oc1ccccc1C(=O)O",
    103: "COc1ccc(CCNC(=O)CCC#CCO)cc1OC",
    104: "CCCCCCCCCC(=O)NCCCCO",
    105: "c1ccccc1",
    106: "NCCc1c[nH]c2ccccc12",
    107: "CCOC(=O)C(N)CCSC",
    108: "CCOC(=O)CC",
}


def drawn(smiles, seed=1):
    """A molecule of RDKit with hydrogens and a geometry of force-field quality."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=seed) == 0
    AllChem.MMFFOptimizeMolecule(mol)
    return mol


@pytest.fixture(scope="module")
def drugs():
    return {key: drawn(smiles) for key, smiles in DRUGS.items()}


@pytest.fixture(scope="module")
def real(drugs):
    """200 molecules with bonds: of QM9, drug-like ones, and two that are not in one part."""
    m, found = Molecules(DEMO), [*drugs.values(), drawn("CCO.CCN"), drawn("CC(C)O.O.c1ccccc1CC")]
    for k in range(300):
        part = m.read([k])
        found.append(from_geometry(None, part["z"].numpy(), part["pos"].double().numpy()))
    found = [mol for mol in found if mol][:200]
    assert len(found) == 200
    return found


def flat(mols):
    """-> pos (N, 3) float64, bond (R, 2), fragment (N,), ptr (M+1,) of a batch."""
    pos, bonds, fragments, ptr, num_rotors = [], [], [], [0], 0
    for mol in mols:
        bond, fragment = (torch.from_numpy(array.astype(np.int64)) for array in rotors(mol))
        bonds.append(bond + ptr[-1])
        fragments.append(torch.where(fragment > 0, fragment + num_rotors, 0))
        pos.append(torch.from_numpy(mol.GetConformer().GetPositions()))
        ptr, num_rotors = [*ptr, ptr[-1] + len(fragment)], num_rotors + len(bond)
    return torch.cat(pos), torch.cat(bonds), torch.cat(fragments), ptr


def torsions(mol, bond):
    """One (i, j, k, l) for each rotor."""
    other = [[n.GetIdx() for n in mol.GetAtomWithIdx(a).GetNeighbors()] for a in range(mol.GetNumAtoms())]
    return [(next(i for i in other[j] if i != k), j, k, next(x for x in other[k] if x != j)) for j, k in bond.tolist()]


def kicks(num, degrees=40.0, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, degrees * np.pi / 180, num))


# --- turning ---


def test_turned_batch_is_that_of_rdkit_up_to_rigid_motions(real):
    """Every bond by 40 degrees: one pass over the batch, against RDKit turning one bond after another."""
    pos, bond, fragment, ptr = flat(real)
    angle = kicks(len(bond))
    turned, done, moved = turn(pos, bond, fragment, angle), 0, 0.0
    for mol, start, stop in zip(real, ptr, ptr[1:]):
        own, place = rotors(mol)[0], Chem.Conformer(mol.GetConformer())
        for i, j, k, x in torsions(mol, own):
            at = geometry.GetDihedralDeg(place, i, j, k, x)
            geometry.SetDihedralDeg(place, i, j, k, x, at + np.degrees(angle[done].item()))
            done += 1
        theirs = torch.from_numpy(place.GetPositions())
        parts = Chem.GetMolFrags(mol)
        for atoms in map(list, parts):
            ours = torch.cdist(*2 * [turned[start:stop][atoms]], compute_mode="donot_use_mm_for_euclid_dist")
            assert (
                ours - torch.cdist(*2 * [theirs[atoms]], compute_mode="donot_use_mm_for_euclid_dist")
            ).abs().max() < 1e-10
        moved = max(moved, (turned[start:stop] - pos[start:stop]).norm(dim=1).max())
    assert done == len(bond) > 500 and moved > 3


def test_bonds_and_angles_stay_and_each_torsion_grows_by_its_angle(real):
    pos, bond, fragment, ptr = flat(real)
    angle, done = kicks(len(bond), seed=1), 0
    turned = turn(pos, bond, fragment, angle)
    for mol, start, stop in zip(real, ptr, ptr[1:]):
        before, after = (SimpleNamespace(x=p[start:stop].numpy()) for p in (pos, turned))
        near = Chem.GetDistanceMatrix(mol)
        i, j = np.nonzero((near == 1) | (near == 2))  # 1-3 distances are the angles
        lengths = [np.linalg.norm(p.x[i] - p.x[j], axis=1) for p in (before, after)]
        np.testing.assert_allclose(*lengths, rtol=0, atol=1e-12)
        for four in torsions(mol, rotors(mol)[0]):
            places = [Chem.Conformer(len(near)) for _ in range(2)]
            for place, p in zip(places, (before, after)):
                place.SetPositions(p.x)
            a, b = (geometry.GetDihedralRad(place, *four) for place in places)
            grown = b - a - angle[done].item()
            assert abs((grown + np.pi) % (2 * np.pi) - np.pi) < 1e-9
            done += 1


def test_a_batch_turns_as_its_molecules_do(real):
    pos, bond, fragment, ptr = flat(real)
    angle, done = kicks(len(bond)), 0
    turned = turn(pos, bond, fragment, angle)
    for mol, start, stop in zip(real, ptr, ptr[1:]):
        alone, own_bond, own_fragment, _ = flat([mol])
        alone = turn(alone, own_bond, own_fragment, angle[done : done + len(own_bond)])
        assert torch.equal(alone, turned[start:stop])
        done += len(own_bond)


def test_precision_and_an_angle_of_zero(real):
    pos, bond, fragment, _ = flat(real)
    angle, single = kicks(len(bond)), pos.float()
    for p in (pos, single):
        assert torch.equal(turn(p, bond, fragment, torch.zeros(len(bond), dtype=p.dtype)), p)
    exact, ours = turn(pos, bond, fragment, angle), turn(single, bond, fragment, angle.float())
    assert ours.dtype == torch.float32 and (exact - ours).abs().max() < 2e-5
    with torch.autocast("cpu", torch.bfloat16):  # precision=bf16 is for the network
        assert torch.equal(turn(single, bond, fragment, angle.float()), ours)
    none = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(len(pos), dtype=torch.int64), pos.new_zeros(0)
    assert torch.equal(turn(pos, *none), pos)


# --- which bonds, which fragments ---


@pytest.mark.parametrize(
    ("smiles", "number"),
    [
        ("CC(=O)NC", 3),  # two methyls and the amide
        ("Cc1ccccc1", 1),
        ("c1ccccc1-c1ccccc1", 1),
        ("CO", 1),
        ("CC", 1),
        ("C=CC=C", 1),
        ("CC#CC", 0),
        ("CC#N", 0),
        ("C=C", 0),
        ("C1CCCCC1", 0),
        ("O", 0),
        ("CCO.CCN", 4),
        ("CCCCCCCCCC", 9),
    ],
)
def test_which_bonds_turn(smiles, number):
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    bond, fragment = rotors(mol)
    assert len(bond) == number and bond.dtype == fragment.dtype == np.uint16 and len(fragment) == mol.GetNumAtoms()
    for j, k in bond.tolist():
        assert not mol.GetBondBetweenAtoms(j, k).IsInRing()


def test_fragments_are_trees_with_the_largest_piece_at_the_root(real):
    chains = 0
    for mol in real:
        bond, fragment = (array.astype(int) for array in rotors(mol))
        assert sorted(set(fragment)) == list(range(len(bond) + 1))
        for r, (j, k) in enumerate(bond):
            assert fragment[k] == r + 1 and fragment[j] <= r
        depth = [0]
        for j, _ in bond:
            depth.append(depth[fragment[j]] + 1)
        for atoms in map(list, Chem.GetMolFrags(mol)):
            pieces, sizes = np.unique(fragment[atoms], return_counts=True)
            assert pieces[0] == 0 and sizes[0] == sizes.max()  # each part has a root, the largest of its pieces
            levels = [depth[f] for f in pieces]
            assert levels == sorted(levels)  # breadth first
        chains = max(chains, *depth)
    assert chains >= 5


# --- the objective ---


def tiny(scale, **changes):
    small = ModelConfig(embedding_dimension=16, num_layers=2, num_rbf=8, num_heads=2, vec_norm_layer="none")
    common = {"objective": "coord", "position_noise_scale": 0.04, "alpha": 1.0, "model": small}
    return SimpleNamespace(**common | {"dihedral_angle_noise_scale": scale} | changes)


def outcome(kind, config, batch, noise, **inputs):
    """Weights, losses and gradients of one step from the seed."""
    torch.manual_seed(3)
    net = kind(EquivariantTransformer(config.model), config)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    losses = net(batch["z"], batch["pos"], batch["batch"], noise, 20, **inputs)
    losses["loss"].backward()
    return start, losses, {name: p.grad for name, p in net.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """60 molecules of QM9, with splits and labels, and the same with rotors."""
    folder = tmp_path_factory.mktemp("rotors")
    sample(Molecules(DEMO), folder / "plain.h5", 60, 1)
    with h5py.File(folder / "plain.h5", "r+") as file:
        file["split/some"] = np.arange(3, 40)
    add_rotors(folder / "plain.h5", folder / "rotors.h5")
    return folder


def test_without_torsions_it_is_coord_to_the_bit(made):
    molecules = Molecules(made / "rotors.h5")
    batch, inputs = molecules.read(range(20)), Frad.inputs(molecules)(np.arange(20))
    assert Frad.extra_noise == 1 and len(inputs["bond"]) > 20
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((len(batch["z"]), 4), dtype=np.float32))
    coord = outcome(Pretraining, tiny(0.0), batch, noise[:, :3].contiguous())
    frad = outcome(Frad, tiny(0.0), batch, noise, **inputs)
    assert all(map(same, coord, frad))
    turned = outcome(Frad, tiny(2.0), batch, noise, **inputs)
    assert same(coord[0], turned[0]) and not torch.equal(coord[1]["loss"], turned[1]["loss"])
    assert turned[1]["loss"] == turned[1]["loss_noise"]


def test_it_is_coord_on_turned_molecules(made):
    """The angle of a rotor is the number of the atom k that turns, in units of the scale; no other number counts."""
    molecules = Molecules(made / "rotors.h5")
    batch, inputs = molecules.read(range(20)), Frad.inputs(molecules)([*range(20)])
    noise = torch.from_numpy(np.random.default_rng(2).standard_normal((len(batch["z"]), 4), dtype=np.float32))
    bond, fragment = inputs["bond"], inputs["fragment"]
    pos = turn(batch["pos"], bond, fragment, 5 * np.pi / 180 * noise[bond[:, 1], 3])
    frad = outcome(Frad, tiny(5.0), batch, noise, **inputs)
    coord = outcome(Pretraining, tiny(0.0), batch | {"pos": pos}, noise[:, :3].contiguous())
    torch.testing.assert_close(frad[1]["loss"], coord[1]["loss"], rtol=1e-5, atol=0)
    unused = torch.ones(len(noise), dtype=torch.bool)
    unused[bond[:, 1]] = False
    noise[unused, 3] += 1
    assert same(frad[1], outcome(Frad, tiny(5.0), batch, noise, **inputs)[1])


# --- the file ---


def contents(path):
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item[:]}) if isinstance(item, h5py.Dataset) else None)
        units = {name: dict(file[name].attrs) for name in found}
        return found, units, dict(file.attrs)


def test_the_file_is_the_old_one_and_rotors(made):
    (old, old_units, old_attrs), (new, units, attrs) = contents(made / "plain.h5"), contents(made / "rotors.h5")
    names = {"rotor/ptr": np.int64, "rotor/bond": np.uint16, "rotor/fragment": np.uint16}
    assert new.keys() - old.keys() == names.keys() and all(new[name].dtype == dtype for name, dtype in names.items())
    assert all(np.array_equal(old[name], new[name]) and old_units[name] == units[name] for name in old)
    assert "split/some" in old and "y/gap" in old
    line = "python data.py rotors plain.h5 rotors.h5"
    assert attrs == old_attrs | {"command": f"{old_attrs['command']}\n{line}"}
    assert sorted(os.listdir(made)) == ["plain.h5", "rotors.h5"]
    molecules = Molecules(made / "rotors.h5")  # still a file of the schema, with its places
    assert len(molecules.split("some")) == 37 and all(place is not None for place in molecules.places.values())


def test_rotors_are_read_as_they_were_found(made):
    molecules = Molecules(made / "rotors.h5")
    read, index = Frad.inputs(molecules), [7, 3, 59, 3, 0]
    batch, got, atom, rotor = molecules.read(index), read(index), 0, 0
    assert got["bond"].dtype == got["fragment"].dtype == torch.int64
    for m in index:
        one = molecules.read([m])
        mol = from_geometry(None, one["z"].numpy(), one["pos"].double().numpy())
        bond, fragment = rotors(mol) if mol else (np.empty((0, 2)), np.zeros(len(one["z"])))
        mine = got["fragment"][atom : atom + len(fragment)]
        assert (got["bond"][rotor : rotor + len(bond)] - atom).tolist() == bond.tolist()
        assert mine.tolist() == np.where(fragment > 0, fragment + rotor, 0).tolist()
        atom, rotor = atom + len(fragment), rotor + len(bond)
    assert (atom, rotor) == (len(batch["z"]), len(got["bond"])) and rotor > 5
    assert same(read(torch.tensor(index)), got) and same(pickle.loads(pickle.dumps(read))(index), got)
    assert len(read([])["bond"]) == 0


class Read:
    """A data set of batches, for a loader."""

    def __init__(self, read):
        self.read = read

    def __getitem__(self, m):
        return self.read([m, m + 1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_rotors_cross_to_loader_processes(made, method):
    read = Frad.inputs(Molecules(made / "rotors.h5"))
    here = [read([m, m + 1]) for m in range(8)]  # opens the file in this process first
    loader = DataLoader(Read(read), batch_size=None, sampler=range(8), num_workers=1, multiprocessing_context=method)
    assert all(same(a, b) for a, b in zip(here, loader, strict=True))


def changed(made, out, **changes):
    """The file with some of its datasets replaced, None: removed."""
    shutil.copyfile(made / "rotors.h5", out)
    with h5py.File(out, "r+") as file:
        for name, values in changes.items():
            del file[f"rotor/{name}"]
            if values is not None:
                file[f"rotor/{name}"] = values
    return out


def at_first(values, row, value):
    values = values.copy()
    values[row] = value
    return values


def refused(call, *words, code=1):
    with pytest.raises(InputError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and caught.value.code == code


def test_a_file_without_rotors_is_told_how_to_get_them(made):
    refused(lambda: Frad.inputs(Molecules(made / "plain.h5")), "plain.h5 has no rotors", "python data.py rotors")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bond", lambda v: None, "rotor/bond is missing"),
        ("ptr", lambda v: None, "rotor/ptr is missing"),
        ("fragment", lambda v: v[1:], "rotor/fragment is uint16"),
        ("bond", lambda v: v.astype(np.int64), "rotor/bond is int64"),
        ("bond", lambda v: v[:-1], "rotor/bond is uint16"),
        ("ptr", lambda v: v[:-1], "rotor/ptr is int64"),
        ("ptr", lambda v: at_first(v, 0, 1), "rotor/ptr must start at 0"),
        ("ptr", lambda v: at_first(v, 5, v[-1] + 1), "rotor/ptr must start at 0 and never fall"),
        ("ptr", lambda v: {"a": 1}, "rotors are damaged"),
    ],
)
def test_damaged_rotors_are_refused_at_the_door(made, tmp_path, name, change, words):
    with h5py.File(made / "rotors.h5") as file:
        values = change(file[f"rotor/{name}"][:])
    if isinstance(values, dict):  # a folder in the place of a dataset
        path = changed(made, tmp_path / "bad.h5", **{name: None})
        with h5py.File(path, "r+") as file:
            file.create_group(f"rotor/{name}")
    else:
        path = changed(made, tmp_path / "bad.h5", **{name: values})
    refused(lambda: Frad.inputs(Molecules(path)), "bad.h5", words, "python data.py rotors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda bond, fragment, j, k, n: bond.__setitem__((0, 0), n), "a rotor on an atom that is not there"),
        (lambda bond, fragment, j, k, n: fragment.__setitem__(j, 60), "an atom on a rotor that is not there"),
        (lambda bond, fragment, j, k, n: fragment.__setitem__(k, 0), "a rotor that does not turn its own atom"),
        (lambda bond, fragment, j, k, n: fragment.__setitem__(j, 1), "a rotor that stands before the one it hangs on"),
    ],
)
def test_rotors_that_do_not_fit_are_refused_with_their_molecule(made, tmp_path, damage, words):
    with h5py.File(made / "rotors.h5") as file:
        ptr, first = file["ptr"][:], file["rotor/ptr"][:]
        bond, fragment = file["rotor/bond"][:], file["rotor/fragment"][:]
    m = int(np.flatnonzero(np.diff(first) == 2)[3])  # its own rows
    mine, own = bond[first[m] : first[m + 1]], fragment[ptr[m] : ptr[m + 1]]
    damage(mine, own, *mine[0].astype(int), ptr[m + 1] - ptr[m])
    read = Frad.inputs(Molecules(changed(made, tmp_path / "bad.h5", bond=bond, fragment=fragment)))
    refused(lambda: read([m - 1, m, m + 1]), f"bad.h5: molecule {m} has {words}")
    read([m - 1, m + 1])  # the others are whole


# --- finding rotors: every way, and what is refused ---


def stored(mols, out, wrong=()):
    """A file of molecules of RDKit, {id: mol}; those in wrong are blown up, so that RAW does not fit them."""
    stream = [
        {
            "id": key,
            "z": np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]),
            "pos": mol.GetConformer().GetPositions() * (2 if key in wrong else 1),
            "labels": {},
        }
        for key, mol in mols.items()
    ]
    write_h5(out, stream, {"source": "test"}, {})
    return out


def sdf(mols, path, titled=True):
    blocks = "".join(
        f"{key if titled else 'x'}\n{Chem.MolToMolBlock(mol).partition(chr(10))[2]}$$$$\n" for key, mol in mols.items()
    )
    if path.name.endswith(".tar.gz"):
        return tar(path, {"folder/all.sdf": blocks})
    path.write_bytes(gzip.compress(blocks.encode()))
    return path


def wheel(path, smiles):
    with zipfile.ZipFile(path, "w") as archive:
        rows = "".join(f"{key},{text}\n" for key, text in smiles.items())
        archive.writestr("qm9pack/data/qm9_part1.csv", f"Index,SMILES\n{rows}")
    return path


def found(path):
    with h5py.File(path) as file:
        return [file[f"rotor/{name}"][:].tolist() for name in ("ptr", "bond", "fragment")]


def test_sdf_smiles_and_geometry_agree(drugs, tmp_path, capsys):
    plain = stored(drugs, tmp_path / "plain.h5")
    backwards = dict(reversed(drugs.items()))
    ways = {
        "SDF of a.sdf.gz": sdf(backwards, tmp_path / "a.sdf.gz"),
        "SMILES of qm9pack.whl": wheel(tmp_path / "qm9pack.whl", DRUGS),
        "their own geometry": None,
    }
    again = ways["SDF of a.sdf.gz"]
    again.write_bytes(again.read_bytes() * 2)  # every molecule twice
    results = []
    for k, (way, raw) in enumerate(ways.items()):
        add_rotors(plain, tmp_path / f"{k}.h5", raw)
        results.append(found(tmp_path / f"{k}.h5"))
        said = capsys.readouterr().out
        assert f"bonds of {len(drugs)} from" in said and way in said and "bonds of 0 not known" in said
    assert results[0] == results[1] == results[2]
    whole = [rotors(mol) for mol in drugs.values()]
    assert results[0][1] == np.concatenate([bond for bond, _ in whole]).tolist()
    assert results[0][0] == [0, *np.cumsum([len(bond) for bond, _ in whole])] and results[0][0][-1] > 40


def test_ids_by_place_in_an_archive(drugs, tmp_path, capsys):
    plain = stored(dict(enumerate(drugs.values())), tmp_path / "plain.h5")
    add_rotors(plain, tmp_path / "out.h5", sdf(drugs, tmp_path / "a.sdf.tar.gz", titled=False))
    assert f"bonds of {len(drugs)} from the SDF" in capsys.readouterr().out
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["command"] == "python data.py rotors plain.h5 a.sdf.tar.gz out.h5"


def test_bonds_that_do_not_fit_are_not_taken(drugs, tmp_path, capsys):
    """Other atoms, another order, another geometry: RDKit is asked then. Bonds too long: there are none."""
    smiles = DRUGS | {101: "CCO", 102: "O=C(C)Oc1ccccc1C(=O)O", 107: DRUGS[107].replace("S", "O")}
    plain = stored(drugs, tmp_path / "plain.h5", wrong=[108])
    add_rotors(plain, tmp_path / "smiles.h5", wheel(tmp_path / "qm9pack.whl", smiles))
    said = capsys.readouterr().out
    assert "bonds of 4 from the SMILES" in said and "bonds of 3 from their own" in said
    assert "bonds of 1 not known, so no rotors (id 108)" in said
    moved = dict(drugs) | {103: drawn(DRUGS[103], seed=7)}
    add_rotors(plain, tmp_path / "sdf.h5", sdf(moved, tmp_path / "a.sdf.gz"))
    said = capsys.readouterr().out
    assert "bonds of 6 from the SDF" in said and "bonds of 1 from their own" in said
    assert found(tmp_path / "smiles.h5") == found(tmp_path / "sdf.h5")
    assert not len(Frad.inputs(Molecules(tmp_path / "sdf.h5"))([7])["bond"])


def test_a_trajectory_has_the_bonds_of_its_first_frame(drugs, tmp_path, capsys):
    frames = {}
    for key in range(5):
        frames[key] = Chem.Mol(drugs[102])
        pos = drugs[102].GetConformer().GetPositions()
        frames[key].GetConformer().SetPositions(pos + np.random.default_rng(key).normal(0, 0.03, pos.shape))
    add_rotors(stored(frames, tmp_path / "plain.h5", wrong=[3]), tmp_path / "out.h5")
    said = capsys.readouterr().out
    assert "bonds of 4 from the geometry of the first" in said and "bonds of 1 not known" in said
    ptr, bond, _ = found(tmp_path / "out.h5")
    one = rotors(drugs[102])[0].tolist()
    assert ptr == [0, *np.cumsum([len(one)] * 3 + [0, len(one)])] and bond == one * 4


def test_what_cannot_be_given_rotors_is_refused(made, drugs, tmp_path, monkeypatch):
    plain, out = made / "plain.h5", tmp_path / "out.h5"
    other = sdf(drugs, tmp_path / "a.sdf.gz")
    refused(lambda: add_rotors(made / "rotors.h5", out), "rotors.h5 has rotors already")
    refused(lambda: add_rotors(plain, made / "rotors.h5"), "rotors.h5 exists")
    refused(lambda: add_rotors(plain, tmp_path / "out.npz"), "must end in .h5", code=2)
    refused(lambda: add_rotors(tmp_path / "none.h5", out), "none.h5: no such file")
    refused(lambda: add_rotors(plain, out, tmp_path / "none.sdf"), "none.sdf: no such file")
    refused(lambda: add_rotors(plain, out, plain), "bonds are read from .sdf", code=2)
    refused(lambda: add_rotors(plain, out, other), "a.sdf.gz: none of its molecules is in", "plain.h5")
    other.write_bytes(other.read_bytes()[:-40])
    refused(lambda: add_rotors(plain, out, other), "a.sdf.gz: damaged, cut off")
    bare = stored({1: drugs[105]}, tmp_path / "bare.h5")
    with h5py.File(bare, "r+") as file:
        file["z"][:] = 6
    refused(lambda: add_rotors(bare, out), "bare.h5 has no hydrogen")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(lambda: add_rotors(plain, out), "out.h5: cannot be written (No space left on device)")
    assert sorted(os.listdir(tmp_path)) == ["a.sdf.gz", "bare.h5"]


# ---------------------------------------------------------------- runs


def test_a_stopped_run_goes_on_to_the_same_bits_and_no_angle_is_coord(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(
        yaml.safe_dump(TINY | {"data": str(made / "rotors.h5"), "objective": "frad", "max_steps": 8})
    )
    pretrain.main(["tiny.yaml", "out_dir=whole"])
    pretrain.main(["tiny.yaml", "out_dir=again", "max_steps=3"])
    pretrain.main(["tiny.yaml", "out_dir=again", "resume=true", "num_workers=1"])
    assert same_bits("whole", "again")
    pretrain.main(["tiny.yaml", "out_dir=still", "dihedral_angle_noise_scale=0"])
    pretrain.main(["tiny.yaml", "out_dir=coord", "objective=coord"])
    assert same_bits("still", "coord") and not same_bits("whole", "coord")


@pytest.mark.slow
def test_two_ranks_equal_one(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": str(made / "rotors.h5"), "objective": "frad"}))
    pretrain.main(["tiny.yaml", "out_dir=whole"])
    run("tiny.yaml", "out_dir=two", ranks=2)
    for a, b in zip(read_log("whole"), read_log("two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_rotors_are_added_by_the_command_of_the_readme(tmp_path, capsys):
    data.main(["sample", str(DEMO), str(tmp_path / "few.h5"), "num=20", "seed=1"])
    data.main(["rotors", str(tmp_path / "few.h5"), str(tmp_path / "rotors.h5")])
    assert "their own geometry" in capsys.readouterr().out
    assert len(Molecules(tmp_path / "rotors.h5", Frad.inputs).read([0, 3])["inputs"]["fragment"]) > 2

"""predict: the numbers of the model, in eV, for molecules of a file; what it cannot do is said."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import finetune
from data import Molecules
from finetune import load_property_model
from harness.errors import InputError
from tools import predict

ase = pytest.importorskip("ase")
io = pytest.importorskip("ase.io")

ROOT = Path(__file__).parent.parent
QM9, ETHANOL = ROOT / "data/qm9_demo.h5", ROOT / "data/ethanol_demo.h5"
MODEL = {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4}
MODEL |= {"vector_cutoff": True}
COMMON = {"lr": 1e-2, "lr_warmup_steps": 2, "lr_cosine_length": 20, "max_steps": 20}
COMMON |= {"batch_size": 8, "val_size": 20, "test_size": 20, "model": MODEL}
GAP = {**COMMON, "data": str(QM9), "target": "gap", "train_size": 100}
FORCES = {**COMMON, "data": str(ETHANOL), "target": "energy_forces", "train_size": 200}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two runs of a second."""
    folder = tmp_path_factory.mktemp("runs")
    for name, settings in (("gap", GAP), ("forces", FORCES)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        finetune.main([str(folder / f"{name}.yaml"), f"out_dir={folder / name}"])
    return folder


def fails(arguments, message, code=None):
    with pytest.raises(InputError) as error:
        predict.main([str(argument) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert code in (None, error.value.code)


def test_energies_and_forces(runs):
    best = runs / "forces/best.pt"
    model, _ = load_property_model(best)
    part = Molecules(ETHANOL).read([7])
    z, pos = part["z"], part["pos"].double()
    frames = [ase.Atoms(z.numpy(), pos.numpy() + k) for k in range(2)]
    io.write("in.xyz", frames, format="extxyz")
    predict.main([str(best), "in.xyz", "out.xyz"])
    first, second = io.read("out.xyz", ":")
    batch = torch.zeros_like(z)
    y, forces = model(z, pos.float(), batch, 1, forces=True)
    energy = model.restore(y, z, batch).item()
    assert first.get_potential_energy() == pytest.approx(energy, abs=1e-4)
    assert second.get_potential_energy() == pytest.approx(energy, abs=1e-4)
    assert first.get_forces() == pytest.approx((forces.double() * model.std).numpy(), abs=1e-5)

    content = torch.load(best, weights_only=True)
    content["property"]["unit"] = "kcal/mol"
    torch.save(content, "kcal.pt")
    predict.main(["kcal.pt", "in.xyz", "kcal.xyz"])
    kcal, unit = io.read("kcal.xyz", 0), ase.units.kcal / ase.units.mol
    assert kcal.get_potential_energy() == pytest.approx(energy * unit, abs=1e-4)
    assert kcal.get_forces() == pytest.approx(first.get_forces() * unit, abs=1e-6)
    content["property"]["target"] = "energy"  # as target=energy makes it: without forces
    torch.save(content, "energy.pt")
    predict.main(["energy.pt", "in.xyz", "energy.xyz"])
    alone = io.read("energy.xyz", 0)
    assert alone.get_potential_energy() == pytest.approx(energy * unit, abs=1e-4) and "forces" not in alone.calc.results
    predict.main(["energy.pt", "energy.xyz", "again.xyz"])  # it reads what it wrote


def test_a_property_stands_beside_its_unit(runs):
    water = ase.Atoms("OHH", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    io.write("in.xyz", water, format="extxyz")
    predict.main([str(runs / "gap/best.pt"), "in.xyz", "out.xyz"])
    info = io.read("out.xyz").info
    assert info["predicted_unit"] == "eV" and math.isfinite(info["gap"])


def test_several_properties(runs):
    finetune.main([str(runs / "gap.yaml"), "target=gap,mu", "max_steps=2", "out_dir=two"])
    water = ase.Atoms("OHH", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]], info={"mu": 1.8})
    io.write("in.xyz", water, format="extxyz")
    predict.main(["two/best.pt", "in.xyz", "out.xyz"])
    found = io.read("out.xyz")
    model, _ = load_property_model("two/best.pt")
    z, pos = torch.from_numpy(found.numbers), torch.from_numpy(found.positions).float()
    y = model.restore(model(z, pos, torch.zeros_like(z), 1)[0], z, torch.zeros_like(z))[0].tolist()
    assert [found.info["gap"], found.info["mu"]] == pytest.approx(y, abs=1e-5)
    assert found.info["predicted_unit"] == "gap eV, mu D" and found.info["given_mu"] == 1.8


def test_what_it_cannot_predict_is_one_line(runs):
    best = runs / "forces/best.pt"
    content = torch.load(best, weights_only=True)
    content["property"]["unit"] = "hartree"
    torch.save(content, "hartree.pt")
    io.write("in.xyz", ase.Atoms("OH", [[0, 0, 0], [0, 0, 0.9]]), format="extxyz")
    io.write("fluorine.xyz", ase.Atoms("HF", [[0, 0, 0], [0, 0, 0.9]]), format="extxyz")
    Path("junk.xyz").write_text("not an xyz\nat all\n")
    Path("empty.xyz").write_text("")
    Path("out.xyz").write_text("of before")
    fails([best, "in.xyz", "out.xyz"], "out.xyz exists")
    fails([best, "fluorine.xyz", "new.xyz"], "element 9")
    fails([best, "nowhere.xyz", "new.xyz"], "nowhere.xyz")
    fails([best, "junk.xyz", "new.xyz"], "junk.xyz")
    fails([best, "empty.xyz", "new.xyz"], "empty.xyz")
    fails([best, "in.xyz", "nowhere/new.xyz"], "nowhere: no such folder")
    fails(["hartree.pt", "in.xyz", "new.xyz"], "energies in hartree")
    fails([runs / "forces/last.pt", "in.xyz", "new.xyz"], "no best.pt")
    fails(["in.xyz", "in.xyz", "new.xyz"], "in.xyz")
    fails([best, "in.xyz"], "usage", code=2)
    assert Path("out.xyz").read_text() == "of before" and not Path("new.xyz").exists()


def test_a_molecule_with_an_untrained_element_is_left_out(runs, capsys):
    places = [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]]
    io.write("in.xyz", [ase.Atoms(symbols, places) for symbols in ("OHH", "SHH", "OHH")], format="extxyz")
    predict.main([str(runs / "gap/best.pt"), "in.xyz", "out.xyz"])
    assert (
        "left out: in.xyz: molecule 1: the model was trained on no molecule with element 16" in capsys.readouterr().out
    )
    assert [atoms.symbols[0] for atoms in io.read("out.xyz", ":")] == ["O", "O"]


def test_an_energy_with_an_unknown_constant_is_told(runs, capsys):
    """Ethanol alone does not tell the references of its elements apart; QM9's molecules do."""
    places = [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]]
    part = Molecules(ETHANOL).read([7])
    ethanol = ase.Atoms(part["z"].numpy(), part["pos"].numpy())
    io.write("in.xyz", [ase.Atoms("OHH", places), ethanol, *[ethanol + ase.Atoms("OHH", np.add(places, 9))]])
    predict.main([str(runs / "forces/best.pt"), "in.xyz", "out.xyz"])
    said = capsys.readouterr().out
    remark = "an unknown constant is in its energy: training had no such composition"
    assert [f"molecule {k}: {remark}" in said for k in range(3)] == [True, False, True]
    config = finetune.FinetuneConfig(target="U0")
    labels = finetune.Labels(config, Molecules(QM9), np.arange(500), {}, 100)
    assert len(labels.span) == len(labels.elements) == 5
    assert not predict.offset({"span": labels.span}, np.array([8, 1, 1]))


def test_broken_geometries_are_refused(runs):
    for positions in ("0 0 nan", "0 0 0"):
        Path("in.xyz").write_text(f"2\n\nH 0 0 0\nH {positions}\n")
        with pytest.raises(InputError, match="molecule 0 has"):
            predict.main([str(runs / "forces/best.pt"), "in.xyz", "out.xyz"])
        assert not Path("out.xyz").exists()


def test_a_bound_on_neighbours_is_one_line(runs):
    """Checked in the radius graph, it names the molecule."""
    content = torch.load(runs / "forces/best.pt", weights_only=True)
    content["model"]["max_num_neighbors"] = 2
    torch.save(content, "bound.pt")
    io.write("in.xyz", ase.Atoms("OHH", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]]))
    fails(["bound.pt", "in.xyz", "new.xyz"], "molecule 0: the radius graph: max_num_neighbors = 2")


def of_geometry(best, atoms):
    """What the model says of these atoms."""
    model, about = load_property_model(best)
    z, pos = torch.from_numpy(atoms.numbers).long(), torch.from_numpy(atoms.positions)
    return predict.predict_molecule(model, about, z, pos)[0]


def test_molecules_from_an_sdf(runs, capsys):
    """One tag of the name that is predicted is a given one; what is odd of a molecule is said."""
    chem = pytest.importorskip("rdkit.Chem")
    geometry = pytest.importorskip("rdkit.Chem.rdDistGeom")
    best = runs / "gap/best.pt"
    with chem.SDWriter("in.SDF") as file:
        for k, smiles in enumerate(("CCO", "c1ccccc1", "CC")):
            mol = chem.AddHs(chem.MolFromSmiles(smiles))
            assert geometry.EmbedMolecule(mol, randomSeed=1) == 0
            mol = chem.RemoveHs(mol) if k == 2 else mol
            mol.SetProp("gap", f"{k + 5.5}")
            mol.SetProp("id", f"{k + 77}")
            mol.SetProp("Lattice", "5 0 0 0 5 0 0 0 5")
            file.write(mol)
    predict.main([str(best), "in.SDF", "out.xyz"])
    assert "an atom with a free valence: are hydrogens left out? (1 molecules)" in capsys.readouterr().out
    found = io.read("out.xyz", ":")
    assert [len(atoms) for atoms in found] == [9, 12, 2]
    for k, atoms in enumerate(found):
        assert atoms.info.keys() == {"id", "gap", "given_gap", "predicted_unit"} and not atoms.pbc.any()
        assert atoms.info["id"] == k and atoms.info["given_gap"] == k + 5.5 and atoms.info["predicted_unit"] == "eV"
        assert atoms.info["gap"] == pytest.approx(of_geometry(best, atoms), abs=1e-5)  # of positions in 8 digits


TABLE = "name,SMILES,gap,stress,gap\nethanol,CCO,5.5,1,99\nbroken,C(,1,,\nsalt,[Na+].CC(=O)[O-],,,\nF,c1ccccc1,,,\n"


def test_molecules_from_smiles(runs, capsys):
    """A row that makes no molecule is said and left out; of a column that stands twice the first counts."""
    pytest.importorskip("rdkit")
    best = runs / "gap/best.pt"
    Path("in.csv").write_text(TABLE.replace("salt,[Na+].CC(=O)[O-],,,\n", "water,O.C,,,\n"))
    predict.main([str(best), "in.csv", "out.xyz"])
    said = capsys.readouterr().out
    assert "left out: row 1 C(: RDKit cannot read the SMILES" in said and "a salt or a hydrate (1 molecules)" in said
    found = io.read("out.xyz", ":")
    assert [(atoms.info["id"], len(atoms)) for atoms in found] == [(0, 9), (2, 8), (3, 12)]
    for atoms in found:
        assert atoms.info["gap"] == pytest.approx(of_geometry(best, atoms), abs=1e-5)
    assert [atoms.info.get("given_gap") for atoms in found] == [5.5, None, None]
    Path("salt.csv").write_text(TABLE)
    predict.main([str(best), "salt.csv", "salt.xyz"])
    assert (
        "left out: salt.csv: molecule 2: the model was trained on no molecule with element 11"
        in capsys.readouterr().out
    )
    assert [atoms.info["id"] for atoms in io.read("salt.xyz", ":")] == [0, 3]
    with gzip.open("in.tsv.gz", "wt") as file:
        file.write("SMILES\tx\nCCO\t1\n")
    predict.main([str(best), "in.tsv.gz", "zipped.xyz"])
    assert io.read("zipped.xyz").info["gap"] == pytest.approx(found[0].info["gap"], abs=1e-5)


def test_tables_that_cannot_be_predicted_are_one_line(runs):
    pytest.importorskip("rdkit")
    best = runs / "gap/best.pt"
    for text, said, code in (
        ("name,formula\nethanol,C2H6O\n", "no column 'smiles'; there are: name, formula", 2),
        ("", "no header", None),
        ("SMILES\n[Pb]C\n", "element 82", None),
        ('SMILES,note\nCCO,"6 inch\nC,1\nCC,2\n', "in.csv", None),
        ('SMILES,note\nCCO,"6 inch\nC,1\nCC,"a"\n', "in.csv", None),
    ):
        Path("in.csv").write_text(text)
        fails([best, "in.csv", "never.xyz"], said, code)
        assert not list(Path().glob("*never*"))


@pytest.mark.parametrize("name", ["unit", "pbc", "stress", "dipole", "Lattice", "a=b", 'a"b'])
def test_a_name_that_extended_xyz_has_for_itself(runs, name):
    """Then the number is called predicted."""
    content = torch.load(runs / "gap/best.pt", weights_only=True)
    content["property"]["name"] = name
    torch.save(content, "named.pt")
    water = ase.Atoms("OHH", [[0, 0, 0], [0, 0, 0.96], [0.93, 0, -0.24]])
    io.write("in.xyz", water, format="extxyz")
    predict.main(["named.pt", "in.xyz", "out.xyz"])
    found = io.read("out.xyz")
    assert found.info["predicted"] == pytest.approx(of_geometry(runs / "gap/best.pt", found), abs=1e-5)
    assert found.info["predicted_unit"] == "eV"

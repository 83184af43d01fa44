"""Wrong files, configs, checkpoints and arguments: one clear line each, the right exit code, nothing written."""

import os
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import finetune
import lipschitz
import pretrain
from beyond.join import sample
from data import Molecules
from harness.errors import InputError
from harness.settings import load_config
from studies import graph_embedding, ntk
from tools import benchmark, predict

ROOT = Path(__file__).parent.parent
SMALL = f"small={ROOT / 'data/qm9_demo.h5'}"
MODEL = {"embedding_dimension": 16, "num_layers": 1, "num_rbf": 8, "num_heads": 4}
COMMON = {"batch_size": 4, "max_steps": 2, "log_every": 1, "model": MODEL}
CONFIGS = {
    "p": {**COMMON, "data": "ok.h5", "val_size": 4},
    "f": {**COMMON, "data": "ok.h5", "target": "gap", "train_size": 12, "val_size": 4, "test_size": 4},
    "e": {**COMMON, "data": "eth.h5", "target": "energy_forces", "train_size": 12, "val_size": 4, "test_size": 4},
    "probe": {**COMMON, "data": "ok.h5", "target": "gap", "train_size": 12, "val_size": 4, "test_size": 4}
    | {"freeze_encoder": True, "init_from": "run/encoder.pt"},
}
PROGRAMS = {
    "data": data.main,
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "predict": predict.main,
    "lipschitz": lipschitz.main,
    "ntk": ntk.main,
    "benchmark": benchmark.main,
    "graph_embedding": graph_embedding.main,
}

# ---------------------------------------------------------------- files that are wrong


def changed(source, target, **changes):
    """A copy of an HDF5 file with datasets replaced, or removed (None), or attributes set (attr_<name>)."""
    shutil.copy(source, target)
    with h5py.File(target, "a") as file:
        for name, value in changes.items():
            name = name.replace("__", "/")
            if name.startswith("attr_"):
                file.attrs[name.removeprefix("attr_")] = value
                continue
            attributes = dict(file[name].attrs) if name in file else {}
            if name in file:
                del file[name]
            if value is not None:
                file[name] = value
                file[name].attrs.update(attributes)


def make_h5():
    m = Molecules("ok.h5")
    with h5py.File("ok.h5") as file:
        z, pos, ptr, gap = file["z"][:], file["pos"][:], file["ptr"][:], file["y/gap"][:]
    whole = Path("ok.h5").read_bytes()
    Path("cut.h5").write_bytes(whole[: len(whole) // 2])
    Path("text.h5").write_text("z,x,y,z\n6,0,0,0\n")
    Path("empty.h5").write_bytes(b"")
    Path("folder.h5").mkdir()
    nan_pos, z0, z119, close = pos.copy(), z.copy(), z.copy(), pos.copy()
    nan_pos[ptr[:-1]], z0[ptr[:-1]], z119[ptr[:-1]], close[ptr[:-1]] = np.nan, 0, 119, pos[ptr[:-1] + 1] + 1e-3
    inf_pos, back, late, hollow = pos.copy(), ptr.copy(), ptr.copy(), ptr.copy()
    inf_pos[ptr[:-1]], back[3], late[0], hollow[2] = np.inf, back[5], 1, hollow[1]
    changed("ok.h5", "schema.h5", attr_schema="georecon/2")
    changed("ok.h5", "length.h5", attr_length_unit="bohr")
    changed("ok.h5", "nan.h5", pos=nan_pos)
    changed("ok.h5", "inf.h5", pos=inf_pos)
    changed("ok.h5", "z0.h5", z=z0)
    changed("ok.h5", "z119.h5", z=z119)
    changed("ok.h5", "close.h5", pos=close)
    changed("ok.h5", "back.h5", ptr=back)
    changed("ok.h5", "late.h5", ptr=late)
    changed("ok.h5", "hollow.h5", ptr=hollow)
    changed("ok.h5", "none.h5", ptr=np.array([0]))
    changed("ok.h5", "short_z.h5", z=z[:-1])
    changed("ok.h5", "short_pos.h5", pos=pos[:-2])
    changed("ok.h5", "flat_pos.h5", pos=pos.reshape(-1))
    changed("ok.h5", "double_pos.h5", pos=pos.astype(np.float64))
    changed("ok.h5", "int_z.h5", z=z.astype(np.int32))
    changed("ok.h5", "no_z.h5", z=None)
    changed("ok.h5", "no_pos.h5", pos=None)
    changed("ok.h5", "no_ptr.h5", ptr=None)
    changed("ok.h5", "no_id.h5", id=None)
    changed("ok.h5", "split_far.h5", split__far=np.array([0, len(m)]))
    changed("ok.h5", "split_twice.h5", split__twice=np.array([1, 1]))
    changed("ok.h5", "split_empty.h5", split__empty=np.array([], dtype=np.int64))
    changed("ok.h5", "short_gap.h5", y__gap=gap[:-1])
    changed("ok.h5", "nan_gap.h5", y__gap=np.full(len(gap), np.nan))
    changed("ok.h5", "same_gap.h5", y__gap=np.ones(len(gap)))
    changed("ok.h5", "no_unit.h5", y__strange=gap)
    with h5py.File("eth.h5") as file:
        forces = file["forces"][:]
    changed("eth.h5", "short_forces.h5", forces=forces[:-1])
    changed("eth.h5", "nan_forces.h5", forces=np.full_like(forces, np.nan))
    changed("eth.h5", "no_forces.h5", forces=None)
    far_pos, turned = pos.copy(), np.array([0, 2**63 - 1, 5 - 2**63, int(ptr[-1])])
    far_pos[ptr[:-1]] = 1e30
    changed("ok.h5", "far.h5", pos=far_pos)
    changed("ok.h5", "turned.h5", ptr=turned, id=np.arange(3))
    changed("ok.h5", "taken.h5")
    with h5py.File("taken.h5", "a") as file:
        file["y/energy"] = gap
    changed("ok.h5", "linked.h5", z=None)
    with h5py.File("linked.h5", "a") as file:
        file["z"] = h5py.ExternalLink("ok.h5", "z")
    changed("ok.h5", "torn.h5", pos=None)
    with h5py.File("torn.h5", "a") as file:
        where = file.create_dataset("pos", data=pos, compression="gzip", fletcher32=True).id.get_chunk_info(0)
    with open("torn.h5", "r+b") as file:
        file.seek(where.byte_offset + 20)
        file.write(b"\0" * 50)
    changed("ok.h5", "huge_gap.h5", y__gap=np.where(np.arange(len(gap)) == 3, 1e200, gap))
    one_force = forces.copy()  # of a molecule that is not trained on
    tested = finetune.split_data(load_config(finetune.FinetuneConfig, ["e.yaml"]), Molecules("eth.h5"))[2]
    one_force[Molecules("eth.h5").ptr[tested["test"][0]]] = np.nan
    changed("eth.h5", "test_force.h5", forces=one_force)
    changed("eth.h5", "other_unit.h5")
    with h5py.File("other_unit.h5", "a") as file:
        file["forces"].attrs["unit"] = "hartree/bohr"
    changed("eth.h5", "blank_unit.h5")
    with h5py.File("blank_unit.h5", "a") as file:
        file["energy"].attrs["unit"] = ""
    changed("ok.h5", "splits.h5", split__val=np.array([0, 1]), split__test_val=np.array([2, 3]))
    changed("eth.h5", "strange_unit.h5")
    with h5py.File("strange_unit.h5", "a") as file:
        file["energy"].attrs["unit"], file["forces"].attrs["unit"] = "furlong", "furlong/angstrom"


H5 = {  # file -> what is said of it; read by all stages
    **{
        "cut": "whole HDF5",
        "text": "whole HDF5",
        "empty": "whole HDF5",
        "folder": "a folder",
        "missing": "no such file",
    },
    **{"schema": "schema is georecon/2", "length": "length_unit is bohr", "nan": "not finite", "inf": "not finite"},
    **{
        "z0": "element that does not exist",
        "z119": "element that does not exist",
        "close": "two atoms closer",
        "back": "ptr must",
        "late": "ptr must",
    },
    **{"hollow": "ptr must", "none": "ptr must", "short_z": "dataset z is", "short_pos": "dataset pos is"},
    **{"flat_pos": "dataset pos is", "double_pos": "dataset pos is", "int_z": "dataset z is", "no_z": "z is missing"},
    **{"no_pos": "pos is missing", "no_ptr": "ptr is missing", "no_id": "id is missing", "split_far": "split/far"},
    **{
        "far": "beyond 100000",
        "turned": "ptr must",
        "taken": "y/energy",
        "linked": "another file",
        "torn": "pos is damaged",
    },
    **{"split_twice": "split/twice", "split_empty": "split/empty", "no_unit": "no attribute unit"},
}


def make_checkpoints():
    pretrain.main(["p.yaml", "out_dir=run"])
    finetune.main(["e.yaml", "out_dir=tune"])
    finetune.main(["f.yaml", "out_dir=gap", "keep_steps=0"])
    whole = Path("run/encoder.pt").read_bytes()
    content = torch.load("run/encoder.pt", weights_only=True)
    Path("cut.pt").write_bytes(whole[:-500])
    Path("text.pt").write_text("weights")
    Path("empty.pt").write_bytes(b"")
    torch.save({"schema": "georecon/1", "model": Path("/")}, "pickled.pt")
    torch.save([1, 2], "list.pt")
    torch.save({**content, "schema": "georecon/2"}, "schema.pt")
    torch.save({"weight": torch.zeros(3)}, "other.pt")
    torch.save({**content, "model": content["model"] | {"num_layers": 2}}, "layers.pt")
    torch.save({**content, "model": content["model"] | {"embedding_dimension": 32}}, "channels.pt")
    torch.save({**content, "model": content["model"] | {"strange": 1}}, "strange.pt")
    torch.save({**content, "model": {}}, "defaults.pt")
    spoilt = {k: v.clone() for k, v in content["state_dict"].items()}
    spoilt["embedding.weight"][0, 0] = torch.nan
    torch.save({**content, "state_dict": spoilt}, "nan.pt")
    weight, wide = spoilt["embedding.weight"], torch.zeros(1).expand(10**12)
    for name, value in {"sparse": weight.to_sparse(), "wide": wide}.items():
        torch.save({**content, "state_dict": content["state_dict"] | {"embedding.weight": value}}, f"{name}.pt")
    for name, value in {"heads": ("num_heads", 0), "size": ("embedding_dimension", 4 * 10**7)}.items():
        torch.save({**content, "model": content["model"] | dict([value])}, f"{name}.pt")
    torch.save({**content, "model": content["model"] | {"cutoff_upper": float("nan")}}, "cutoff.pt")
    for name in BEST:
        content = torch.load("tune/best.pt", weights_only=True)
        key, _, value = name.partition("=")
        content["property"][key] = {"none": None, "text": "q", "number": 5}[value]
        torch.save(content, f"best_{name}.pt")
    for name, value in LAST.items():
        shutil.copytree("run", f"last_{name}")
        content = torch.load("run/last.pt", weights_only=True)
        if name.startswith("optimizer_"):
            content["optimizer"]["state"] = {k: dict(v) for k, v in content["optimizer"]["state"].items()}
            value(content["optimizer"])
        else:
            content[name if name in content else name.partition("_")[0]] = value
        torch.save(content, f"last_{name}/last.pt")
    shutil.copytree("tune", "no_best")
    Path("no_best/best.pt").unlink()
    finetune.main(["e.yaml", "out_dir=other_seed", "seed=2"])
    for name, entry in TUNE_LAST.items():
        shutil.copytree("tune", f"tune_{name}")
        torch.save(torch.load("tune/last.pt", weights_only=True) | entry, f"tune_{name}/last.pt")
    for name, source in {"seed": "other_seed/best.pt", "target": "gap/best.pt"}.items():
        shutil.copytree("tune", f"foreign_{name}")
        shutil.copy(source, f"foreign_{name}/best.pt")
    shutil.copytree("run", "copied")
    content = torch.load("run/last.pt", weights_only=True)
    torch.save({**content, "schema": "georecon/2"}, "next_schema.pt")
    content = torch.load("tune/best.pt", weights_only=True)
    content["state_dict"]["std"] = -content["state_dict"]["std"]
    torch.save(content, "best_std=negative.pt")
    content["property"]["unit"] = "a\nb"
    torch.save(content, "best_unit=lines.pt")


TUNE_LAST = {
    "best_val": {"best_val": {}}, "best_text": {"best_val": {"energy_mae": "x", "forces_mae": 1.0}},
    "plateau": {"plateau": {"best": "x", "num_bad_epochs": 0}}, "no_plateau": {"plateau": {}},
}  # fmt: skip
BEST = ("reduce=text", "head=text", "target=number", "unit=none", "elements=none", "name=none", "step=text")
LAST = {  # last.pt with one entry changed
    "step_text": "3", "step_less": -5, "step_half": 2.5, "step_none": None, "wall_s": "x", "first_val": 5, "config": 5,
    "config_model": {"model": 5}, "optimizer": {}, "state_dict": [1],
    "optimizer_shape": lambda optimizer: optimizer["state"][0].update(exp_avg=torch.zeros(3)),
    "optimizer_dtype": lambda optimizer: optimizer["state"][0].update(step=torch.tensor(2.0, dtype=torch.float64)),
    "optimizer_nan": lambda optimizer: optimizer["state"][0]["exp_avg_sq"].fill_(torch.nan),
    "optimizer_empty": lambda optimizer: optimizer["state"].clear(),
    "optimizer_key": lambda optimizer: optimizer["state"][0].pop("exp_avg"),
    "optimizer_thin": lambda optimizer: optimizer["state"][0].update(
        exp_avg=torch.zeros(1).expand(optimizer["state"][0]["exp_avg"].shape)
    ),
    "optimizer_many": lambda optimizer: optimizer["state"].update({1000: optimizer["state"][0]}),
}  # fmt: skip


CHECKPOINTS = {
    **{"missing": "no such file", "cut": "cut off", "text": "torch file", "empty": "torch file"},
    **{"pickled": "could run code", "list": "holds a list", "schema": "schema is georecon/2", "other": "missing"},
    **{"layers": "missing", "channels": "is needed", "strange": "strange", "defaults": "missing", "nan": "not finite"},
    **{"sparse": "no plain tensor", "wide": "no plain tensor", "heads": "num_heads", "size": "made of size.pt"},
    **{"cutoff": "cutoff_upper"},
}


def make_configs():
    for name, content in CONFIGS.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    text = Path("p.yaml").read_text()
    for name, content in {
        "list": "- a\n- b\n",
        "empty": "",
        "word": "pretrain",
        "twice": text + "batch_size: 8\n",
        "tab": "data: a\n\tlr: 1\n",
        "open": "model: {num_layers: 2\n",
        "anchor": "data: *nothing\n",
        "code": "data: !!python/object/apply:os.system ['touch hacked']\n",
        "number_key": text + "3: 4\n",
        "flat_model": text.replace("model:\n", "model: 3\nother:\n"),
        "null": text.replace("batch_size: 4", "batch_size: null"),
        "long": text + f"seed: 1{'0' * 400}\n",
        "digits": text + f"seed: 1{'0' * 5000}\n",
        "date": text + "lr: 2020-01-01\n",
        "no_date": text + "lr: 2020-13-45\n",
        "set": text + "lr: !!set {a}\n",
        "tag": text + "lr: !!float x\n",
        "map": "!!map [a, b]\n",
        "deep": "[" * 3000,
        "nul": text + 'out_dir: "a\\0b"\n',
        "base_nul": text + 'base: "a\\0b"\n',
        "base_missing": "base: nowhere.yaml\n" + text,
        "base_of_base": "base: y_base_once.yaml\n",
        "base_once": "base: p.yaml\n",
        "base_itself": "base: y_base_itself.yaml\n",
    }.items():
        Path(f"y_{name}.yaml").write_text(content)
    Path("y_binary.yaml").write_bytes(b"\xff\xfe\x00data: a")
    Path("y_folder.yaml").mkdir()


YAML = {
    **{"list": "mapping", "empty": "mapping", "word": "mapping", "twice": "twice", "tab": "valid yaml"},
    **{"open": "valid yaml", "anchor": "valid yaml", "code": "valid yaml", "number_key": "unknown key 3"},
    **{
        "flat_model": "mapping",
        "null": "batch_size",
        "base_missing": "nowhere.yaml",
        "base_of_base": "base of another",
    },
    **{
        "long": "seed",
        "digits": "valid yaml",
        "date": "lr =",
        "no_date": "valid yaml",
        "set": "lr =",
        "tag": "valid yaml",
    },
    **{"map": "valid yaml", "deep": "valid yaml", "nul": "out_dir", "base_nul": "valid yaml"},
    **{"base_itself": "base of another", "binary": "valid yaml", "folder": "directory", "missing": "No such file"},
}


def make_raw():
    np.savez("good.npz", z=np.array([8, 1, 1]), R=np.zeros((2, 3, 3)), E=np.zeros(2), F=np.zeros((2, 3, 3)))
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:300])
    np.savez("keys.npz", a=np.zeros(3))
    water = {"z": np.array([8, 1, 1]), "R": np.eye(3)[None], "E": np.zeros(1), "F": np.zeros((1, 3, 3))}
    np.savez("bohr.npz", **water, r_unit="bohr")
    np.savez("hartree.npz", **water, e_unit=np.bytes_("Hartree"))
    np.savez("force.npz", **water | {"F": np.full((1, 3, 3), 1e300)})
    qm9 = "4\ngdb 1\t" + "\t".join(["1.0"] * 15) + "\nC 0 0 0\nH 0 0 1\nH 0 1 0\nH 1 0 0\nH 0 0 -1\n1\nC\tC\nI\tI\n"
    with tarfile.open("count.tar", "w") as archive:
        Path("dsgdb9nsd_000001.xyz").write_text(qm9)
        archive.add("dsgdb9nsd_000001.xyz")
    with zipfile.ZipFile("count.zip", "w") as archive:
        archive.writestr("1.xyz", "2\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
        archive.writestr("2.xyz", "2\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
    with zipfile.ZipFile("named.zip", "w") as archive:
        archive.writestr("a1.xyz", "1\n\nH 0 0 0\n")
    frames = {"nuclear_charges": np.array([8, 1, 1]), "coords": np.zeros((2, 3, 3)), "energies": np.zeros(2)}
    for name, ids in {"half": [0.5, 1], "inf": [0, np.inf], "large": [0, 1e300]}.items():
        np.savez(f"ids_{name}.npz", **frames, forces=np.zeros((2, 3, 3)), old_indices=np.array(ids))
    for name, text in {
        "count": "5\n\nH 0 0 0\nH 0 0 1\n",
        "word": "two\n\nH 0 0 0\nH 0 0 1\n",
        "number": "2\n\nH 0 0 0\nH 0 0 one\n",
        "element": "1\n\nXq 0 0 0\n",
        "columns": "2\n\nH 0 0 0\nH 0 0\n",
        "empty": "",
        "blank": "\n\n",
        "zero": "0\n\n",
        "same": "2\n\nH 0 0 0\nH 0 0 0\n",
        "nan": "2\n\nH 0 0 0\nH 0 0 nan\n",
        "strange": "2\n\nH 0 0 0\nGa 0 0 2.5\n",
        "far": "2\n\nH 0 0 0\nH 0 0 1e200\n",
        "bool": "2\nenergy=T Properties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 1\n",
        "at@3": "2\n\nH 0 0 0\nH 0 0 0\n",
        "between": "2\n\nH 0 0 0\nH 0 0 1\n\n2\n\nH 0 0 0\nH 0 0 1\n",
        "unit": "2\nenergy=1.0 unit=Hartree Properties=species:S:1:pos:R:3\nH 0 0 0\nH 0 0 1\n",
        "mixed": "1\nREF_energy=1.0 Properties=species:S:1:pos:R:3:forces:R:3\nH 0 0 0 0 0 0\n",
    }.items():
        Path(f"x_{name}.xyz").write_text(text)
    Path("x_binary.xyz").write_bytes(bytes(range(256)))
    with zipfile.ZipFile("large_id.zip", "w") as archive:
        archive.writestr("9999999999999999999999999.xyz", "1\n\nH 0 0 0\n")
    with tarfile.open("nothing.tar.bz2", "w:bz2"):
        pass
    with zipfile.ZipFile("nothing.zip", "w") as archive:
        archive.writestr("readme.txt", "x")


XYZ = ("count", "word", "number", "element", "columns", "empty", "blank", "zero", "same", "nan", "binary", "missing")
XYZ += ("far", "at@3", "between")

# ---------------------------------------------------------------- the table: program, arguments, exit code, words

WRONG_VALUES = {  # key=value of both training stages
    **{"batch_size=0": "at least 1", "batch_size=-4": "at least 1", "batch_size=2.5": "must be int"},
    **{"batch_size=four": "must be int", "batch_size=": "must be int", "batch_size=1e30": "must be int"},
    **{"batch_size=1000": "batch_size 1000", "max_steps=0": "at least 1", "lr=fast": "must be float"},
    **{"lr=nan": "must be float", "lr=inf": "must be float", "lr=-1": "at least 0", "seed=-1": "at least 0"},
    **{"resume=maybe": "must be bool", "resume=true": "nothing to resume", "data=": "data is not set"},
    **{"keep_steps=a": "must be int", "keep_steps=-1": "at least 0", "log_every=0": "at least 1"},
    **{"batchsize=4": "did you mean batch_size", "model.num_layer=2": "did you mean model.num_layers"},
    **{"model=3": "mapping", "model.num_heads=3": "multiple of", "model.num_layers=0": "at least 1"},
    **{"model.embedding_dimension=0": "at least 2", "model.cutoff_upper=0": "at least 0.1"},
    **{"model.vec_norm_layer=layer": "one of none, rms, whiten", "model.max_z=5": "model.max_z"},
    **{"model.max_num_neighbors=2": "max_num_neighbors", "val_size=100": "val_size", "accumulate=3": "batch_size"},
    **{"lr_cosine_length=0": "at least 1", "deterministic=2": "must be bool", "num_workers=-1": "at least 0"},
    **{
        "model.cutoff_upper=1e300": "must be below 1000",
        "model.max_z=1e11": "cannot be made",
        "model.num_rbf=1e11": "made",
    },
    **{"model.cutoff_upper=nan": "must be float", f"out_dir={'a' * 300}": "too long", "val_size=1e400": "must be int"},
    **{"out_dir=ok.h5": "ok.h5", "out_dir=ok.h5/run": "ok.h5", "out_dir=run": "already holds a run"},
    **{
        "--resume": "key=value",
        "lr": "key=value",
        "out_dir=/proc/no": "/proc/no",
        "lr=1e30 max_steps=9": "the loss is",
    },
}
CASES = [
    *(("pretrain", [f"y_{name}.yaml"], 2, words) for name, words in YAML.items()),
    *(("finetune", [f"y_{name}.yaml"], 2, words) for name, words in YAML.items()),
    *(("pretrain", ["p.yaml", *value.split()], None, words) for value, words in WRONG_VALUES.items()),
    *(("finetune", ["f.yaml", *value.split()], None, words) for value, words in WRONG_VALUES.items()),
    *(("pretrain", ["p.yaml", f"data={name}.h5"], 1, words) for name, words in H5.items()),
    *(("finetune", ["f.yaml", f"data={name}.h5"], 1, words) for name, words in H5.items()),
    *(("finetune", ["f.yaml", f"init_from={name}.pt"], 1, words) for name, words in CHECKPOINTS.items()),
    *(("lipschitz", [f"{name}.pt", "data=ok.h5", "num_molecules=3"], 1, words) for name, words in CHECKPOINTS.items()),
    *(("data", ["xyz", f"x_{name}.xyz", "new.h5"], 1, f"x_{name}.xyz") for name in XYZ),
    *(("predict", ["tune/best.pt", f"x_{name}.xyz", "new.xyz"], 1, f"x_{name}.xyz") for name in XYZ),
    ("data", ["xyz", "x_bool.xyz", "new.h5"], 1, "frame 0: its energy is True"),
    ("data", ["xyz", "x_unit.xyz", "new.h5"], 1, "its unit says Hartree"),
    ("data", ["xyz", "x_mixed.xyz", "new.h5"], 1, "under REF_"),
    ("data", ["md17", "bohr.npz", "new.h5"], 1, "its r_unit says bohr"),
    ("data", ["md22", "hartree.npz", "new.h5"], 1, "its e_unit says Hartree"),
    ("data", ["md17", "force.npz", "new.h5"], 1, "label that is not finite"),
    ("data", ["qm9", "count.tar", "new.h5"], 1, "another number of atoms"),
    ("data", ["pcqm4mv2", "count.zip", "new.h5"], 1, "not readable as xyz: 2"),
    ("data", ["pcqm4mv2", "named.zip", "new.h5"], 1, "name is no number"),
    ("predict", ["tune/best.pt", "x_strange.xyz", "new.xyz"], 1, "element 31"),
    *(("predict", [f"best_{name}.pt", "x_strange.xyz", "new.xyz"], 1, f"best_{name}.pt") for name in BEST),
    *(("pretrain", ["p.yaml", f"out_dir=last_{name}", "resume=true", "max_steps=4"], 1, "last.pt") for name in LAST),
    ("finetune", ["e.yaml", "out_dir=no_best", "resume=true", "max_steps=4"], 1, "no_best/best.pt"),
    *(("finetune", ["e.yaml", f"out_dir=tune_{name}", "resume=true", "max_steps=4"], 1, "last.pt")
      for name in TUNE_LAST),
    *(("finetune", ["e.yaml", f"out_dir=foreign_{name}", "resume=true", "max_steps=4"], 1, "of another run")
      for name in ("seed", "target")),
    ("finetune", ["f.yaml", "out_dir=run", "resume=true", "max_steps=4"], 1, "another program"),
    ("pretrain", ["copied/config.yaml", "resume=true", "max_steps=4"], 2, "out_dir=copied"),
    ("predict", ["best_std=negative.pt", "x_strange.xyz", "new.xyz"], 1, "its std"),
    ("predict", ["best_unit=lines.pt", "x_strange.xyz", "new.xyz"], 1, "no word"),
    ("predict", ["tune/best.pt", "x_strange.xyz", "new.xyz.gz"], 2, "must end in .xyz"),
    ("predict", ["tune/best.pt", "x_strange.xyz", "/proc/new.xyz"], 1, "/proc"),
    ("predict", ["tune/best.pt"], 2, "usage"),
    ("predict", ["run/encoder.pt", "x_strange.xyz", "new.xyz"], 1, "no best.pt"),
    ("predict", ["tune/last.pt", "x_strange.xyz", "new.xyz"], 1, "no best.pt"),
    ("predict", ["pickled.pt", "x_strange.xyz", "new.xyz"], 1, "could run code"),
    ("predict", ["tune/best.pt", "x_strange.xyz", "x_same.xyz"], 1, "exists"),
    ("predict", ["tune/best.pt", "x_strange.xyz", "no/new.xyz"], 1, "no such folder"),
    ("finetune", ["f.yaml", "target=gab"], 2, "no label 'gab'"),
    ("finetune", ["f.yaml", "target="], 2, "target is not set"),
    ("finetune", ["f.yaml", "target=energy_forces"], 2, "has no forces"),
    ("finetune", ["f.yaml", "data=short_gap.h5"], 1, "dataset y/gap"),
    ("finetune", ["f.yaml", "data=nan_gap.h5"], 2, "has 0 molecules for these, gap known"),
    ("finetune", ["f.yaml", "data=same_gap.h5"], 1, "is the same for all"),
    ("finetune", ["e.yaml", "data=short_forces.h5"], 1, "dataset forces"),
    ("finetune", ["e.yaml", "data=nan_forces.h5"], 1, "forces that are not finite"),
    ("finetune", ["e.yaml", "data=test_force.h5"], 1, "forces that are not finite"),
    ("finetune", ["e.yaml", "data=other_unit.h5"], 1, "must be its derivative"),
    ("finetune", ["e.yaml", "data=blank_unit.h5"], 1, "no attribute unit"),
    ("finetune", ["f.yaml", "data=huge_gap.h5"], 1, "gap is not finite"),
    ("finetune", ["e.yaml", "data=no_forces.h5"], 2, "has no forces"),
    ("finetune", ["f.yaml", "train_split=west"], 2, "no such split"),
    ("finetune", ["f.yaml", "test_split=west"], 2, "no such split"),
    ("finetune", ["f.yaml", "train_size=0", "val_size=0"], 2, "only one part"),
    ("finetune", ["f.yaml", "train_size=500"], 2, "train_size = 500"),
    ("finetune", ["f.yaml", "ema_decay=1"], 2, "below 1"),
    ("finetune", ["f.yaml", "lr_factor=1"], 2, "below 1"),
    ("finetune", ["f.yaml", "test_split=,"], 2, "empty"),
    ("finetune", ["f.yaml", "data=splits.h5", "test_split=val,test_val", "test_size=0"], 2, "become test_val"),
    ("finetune", ["f.yaml", "loss=huber"], 2, "one of mse, l1"),
    ("finetune", ["f.yaml", "head=vector"], 2, "one of auto"),
    ("finetune", ["f.yaml", "references=qm9"], 2, "one of auto, none, fit"),
    ("finetune", ["f.yaml", "lr_schedule=step"], 2, "one of cosine"),
    ("finetune", ["f.yaml", "pooling=max"], 2, "one of mean, sum"),
    *(("finetune", ["probe.yaml", value], 2, "freeze_encoder = true")
      for value in ("loss=l1", "clip_norm=1", "ema_decay=0.9", "head=dipole", "accumulate=2", "lr_schedule=plateau")),
    ("finetune", ["probe.yaml", "compile=false", "init_from=nowhere.pt"], 1, "nowhere.pt"),  # as it is
    ("finetune", ["e.yaml", "freeze_encoder=true"], 2, "freeze_encoder = true"),
    ("pretrain", ["p.yaml", "objective=rec"], 2, "one of georecon"),
    ("pretrain", ["p.yaml", "pooling=max"], 2, "one of mean"),
    ("pretrain", ["p.yaml", "precision=16"], 2, "one of 32, tf32, bf16"),
    ("pretrain", ["p.yaml", "decoder_layers=0", "decoder_vec=false"], 2, "a direction"),
    ("pretrain", ["p.yaml", "split=west"], 2, "no such split"),
    ("pretrain", ["p.yaml", "target=gap"], 2, "unknown key target"),
    ("pretrain", ["p.yaml", "val_size=20"], 2, "val_size = 20"),
    ("data", [], 2, "usage"),
    ("data", ["md71", "good.npz", "new.h5"], 2, "usage"),
    ("data", ["md17", "good.npz"], 2, "usage"),
    ("data", ["md17", "good.npz", "new.txt"], 2, "must end in .h5"),
    ("data", ["md17", "good.npz", "ok.h5"], 1, "exists"),
    ("data", ["md17", "good.npz", "no/new.h5"], 1, "no such folder"),
    ("data", ["md17", "good.npz", "new.h5"], 1, "two atoms closer"),
    *(("data", ["rmd17", f"ids_{name}.npz", "new.h5"], 1, "whole numbers") for name in ("half", "inf", "large")),
    ("data", ["pcqm4mv2", "large_id.zip", "new.h5"], 1, "64 bits"),
    ("data", ["md17", "cut.npz", "new.h5"], 1, "cut off"),
    ("data", ["md17", "keys.npz", "new.h5"], 1, "no z, R, E, F"),
    ("data", ["md17", "x_count.xyz", "new.h5"], 1, "not an npz"),
    ("data", ["qm9", "nothing.tar.bz2", "new.h5"], 1, "nothing.tar.bz2"),
    ("data", ["qm9", "nothing.zip", "new.h5"], 2, "nothing.zip"),
    ("data", ["qm9", "good.npz", "new.h5"], 2, "good.npz"),
    ("data", ["pcqm4mv2", "nothing.zip", "new.h5"], 1, "nothing.zip"),
    ("data", ["info", "missing.h5"], 1, "no such file"),
    ("data", ["info", "close.h5"], 1, "two atoms closer"),
    ("data", ["sample", "ok.h5", "new.h5", "num=ten", "seed=1"], 2, "usage"),
    ("data", ["sample", "ok.h5", "new.h5", "num=21", "seed=1"], 2, "20 molecules"),
    ("lipschitz", ["data=ok.h5"], 2, "name one"),
    ("lipschitz", ["run/encoder.pt", "iterations=0", "data=ok.h5"], 2, "at least 1"),
    ("lipschitz", ["run/encoder.pt", "iteration=5", "data=ok.h5"], 2, "did you mean iterations"),
    ("lipschitz", ["run/encoder.pt", "data=ok.h5"], 2, "there are 20"),
    ("lipschitz", ["run/encoder.pt", "data="], 2, "data is not set"),
    ("lipschitz", ["run/encoder.pt", "run/encoder.pt", "data=ok.h5"], 2, "twice"),
    ("ntk", ["data=ok.h5"], 2, "two or more"),
    ("ntk", ["run/last.pt", "data=ok.h5"], 1, "no step_<n>.pt of finetune"),
    ("ntk", ["gap/last.pt", "data=ok.h5", "num_molecules=3"], 2, "two or more"),
    ("ntk", ["gap/last.pt", "exact=true"], 2, "unknown key exact"),
    ("ntk", ["gap/step_0.pt", "gap/last.pt", "data=nan_gap.h5", "num_molecules=3"], 2, "gap known"),
    ("benchmark", ["encoders"], 2, "there are encoder"),
    ("benchmark", ["rounds=0"], 2, "at least 1"),
    ("benchmark", ["alone"], 2, "there are encoder"),
    ("benchmark", ["pretrain", SMALL, "out=run/metrics.json"], 1, "exists"),
    ("benchmark", ["pretrain", SMALL, "out=/proc/new.json"], 1, "/proc"),
    ("benchmark", ["pretrain", "small=ok.h5"], 2, "there are 20 in ok.h5"),
    ("benchmark", ["pretrain", SMALL, "larger=ok.h5"], 2, "there are 20 in ok.h5"),
    ("benchmark", ["pretrain", "forces", SMALL, "md17" + SMALL.removeprefix("small")], 1, "no forces"),
    ("benchmark", ["small=missing.h5"], 1, "no such file"),
    ("benchmark", [SMALL, "md17=missing.h5", "forces"], 1, "no such file"),
    ("finetune", ["e.yaml", "compile=maybe"], 2, "must be true, false or auto"),
    ("graph_embedding", ["run/encoder.pt", "data=ok.h5", "num_molecules=20"], 1, "no last.pt"),
    ("graph_embedding", ["next_schema.pt", "data=ok.h5", "num_molecules=20"], 1, "schema is 'georecon/2'"),
    ("graph_embedding", ["pickled.pt", "data=ok.h5", "num_molecules=20"], 1, "could run code"),
    ("graph_embedding", ["run/last.pt", "data=ok.h5", "num_molecules=5"], 2, "at least 10"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all the files above, good and bad."""
    folder, before = tmp_path_factory.mktemp("bad"), os.getcwd()
    os.chdir(folder)
    sample(Molecules(ROOT / "data/qm9_demo.h5"), "ok.h5", 20, 3)
    sample(Molecules(ROOT / "data/ethanol_demo.h5"), "eth.h5", 20, 3)
    make_configs()
    make_h5()
    make_raw()
    make_checkpoints()
    os.chdir(before)
    return folder


def contents(folder):
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def case_id(case):
    return f"{case[0]} {' '.join(case[1])}"


@pytest.mark.parametrize(("program", "arguments", "code", "words"), CASES, ids=map(case_id, CASES))
def test_bad_input_is_one_line_and_leaves_nothing(place, tally, monkeypatch, program, arguments, code, words):
    monkeypatch.chdir(place)
    before = contents(place)
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("error", RuntimeWarning)
        PROGRAMS[program](arguments)
    error = caught.value
    assert words in str(error) and "\n" not in str(error) and 10 < len(str(error)) < 600, str(error)
    assert code in (None, error.code), error.code
    after = contents(place)
    if program in ("pretrain", "finetune"):  # a run may have begun, never replaced one
        after = {path: when for path, when in after.items() if "/out/" not in path}
        assert not list((place / "out").glob("*/metrics.json")) and not list((place / "out").glob("*/.*.tmp"))
    shutil.rmtree(place / "out", ignore_errors=True)
    assert after == before
    tally["bad inputs tried"] += 1


def test_there_are_many_of_them_and_all_differ():
    assert len(set(map(case_id, CASES))) == len(CASES) >= 150


# ---------------------------------------------------------------- anything at all

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def refused_or(function, *arguments):
    """The result, or None if it is refused in one line; anything else raised is a fault."""
    try:
        return function(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return None


@settings(max_examples=150, **QUIET)
@given(st.text(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*pretrain.PretrainConfig.__dataclass_fields__, "base", "x"]), inner, max_size=4),
    max_leaves=8,
).map(lambda value: yaml.safe_dump(value)))  # fmt: skip
def test_any_yaml_is_a_config_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    config = refused_or(load_config, pretrain.PretrainConfig, [str(path)])
    assert config is None or config.batch_size >= 1


NUMBER = st.integers(-3, 130).map(str) | st.floats().map(str) | st.sampled_from(["", "x", "1e999", "\t", "\x00", "²"])
LINE = st.lists(st.sampled_from(["H", "C", "Xx", "6", "Lattice=\"1 0 0\"", "Properties=species:S:1:pos:R:3"]) | NUMBER,
                max_size=6).map(" ".join)  # fmt: skip


@settings(max_examples=150, **QUIET)
@given(st.lists(LINE, max_size=8), st.booleans())
def test_any_xyz_is_molecules_or_refused(tmp_path_factory, lines, counted):
    base = tmp_path_factory.getbasetemp()
    path, out = base / "any.xyz", base / "any.h5"
    out.unlink(missing_ok=True)
    path.write_text("\n".join([str(max(len(lines) - 1, 0)), *lines] if counted else lines), encoding="utf-8")
    refused_or(data.main, ["xyz", str(path), str(out)])
    if out.exists():
        molecules = Molecules(out)
        read = molecules.read(range(len(molecules)))
        assert read["pos"].isfinite().all() and (read["z"] > 0).all()


@settings(max_examples=150, **QUIET)
@given(
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
    st.floats(0, 1),
)
def test_any_damage_to_an_h5_is_refused_or_harmless(tmp_path_factory, place, damage, kept):
    """Bytes overwritten, the end cut off: what is still read is of the right shape, finite and made of elements.

    Not overwritten is the heap of strings: on a damaged one HDF5 itself (2.0) may loop for ever.
    """
    content = bytearray((place / "eth.h5").read_bytes())
    heap, size = content.find(b"GCOL"), 4096
    if kept < 0.3:
        content = content[: int(len(content) * kept / 0.3)]
    for where, value in damage:
        byte = int(where * len(content))
        if content and not heap <= byte < heap + size:
            content[byte] = value
    path = tmp_path_factory.getbasetemp() / "any.h5"
    path.write_bytes(content)
    molecules = refused_or(Molecules, path)
    if molecules is None:
        return
    read = refused_or(molecules.read, range(len(molecules)), True)
    if read is not None:
        assert (
            read["pos"].isfinite().all()
            and read["forces"].isfinite().all()
            and ((read["z"] >= 1) & (read["z"] <= 118)).all()
        )
        assert len(read["z"]) == len(read["pos"]) == len(read["batch"]) == int(molecules.ptr[-1])

"""How fast this code is, beside TorchMD-NET's own on the same weights and molecules.

    python -m tools.benchmark                      all cases: an hour, a third compiling
    python -m tools.benchmark encoder rounds=3     two minutes; larger=FILE.h5: larger molecules

encoder    50 molecules of `small`, of `larger`, forward and with backward, 256 channels, 8 layers
pretrain   a step of Coord, of GeoRecon, of GeoRecon with alpha = 1.2; 50 molecules, a GPU: 200
family     a step of each objective, 25 molecules (a GPU: 100), whitening, PaiNN; frad: rotors
forces     a training step of energies and forces, 128 channels, 6 layers: 4 and 32 frames of `md17`
md         energy and forces of one frame, as dynamics asks for them

Times are medians of interleaved rounds, ratios medians of the rounds' ratios. The peer is
torchmd-net 3.1.0, if it is installed (pip install torchmd-net==3.1.0 ase, 5 GB with torch).
"""

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import torch

from data import Molecules, StepBatches, choose
from finetune import PropertyModel
from harness.compiled import compile_layers
from harness.errors import InputError, cli, explain
from harness.files import check_new, provenance, write_json
from harness.ranks import tune_cpu
from harness.settings import read_arguments
from model import ModelConfig, new_encoder, setting
from pretrain import PretrainConfig, make_model, objective_of, train_step


@dataclass(frozen=True)
class BenchmarkConfig:
    small: str = "data/qm9_demo.h5"  # molecules of about 18 atoms
    larger: str = ""  # file of molecules of about 33 atoms; empty: its rows are left out
    md17: str = "data/ethanol_demo.h5"  # frames of one molecule with energies and forces
    device: str = setting("cpu", choices=("cpu", "cuda"))
    threads: int = setting(1, low=1)  # of a CPU
    rounds: int = setting(5, low=1)
    out: str = "out/benchmark.json"


WHITEN = {"vec_norm_layer": "whiten", "vec_norm_out": "whiten"}
PUBLISHED = {"x_norm_layer": False, "vec_norm_layer": "none", "vec_norm_out": "none"}  # TorchMD-NET
WIDE = ModelConfig(**PUBLISHED)
FORCES = ModelConfig(embedding_dimension=128, num_layers=6, num_rbf=32, **PUBLISHED)
PEER = dict(model="equivariant-transformer", output_model="Scalar", prior_model=None, spin=False)
PEER |= dict(derivative=True, rbf_type="expnorm", trainable_rbf=False, activation="silu")
PEER |= dict(attn_activation="silu", neighbor_embedding=True, distance_influence="both")
PEER |= dict(reduce_op="add", static_shapes=False, check_errors=True, box_vecs=None, cutoff_lower=0.0)
PEER |= dict(max_num_neighbors=128, atom_filter=-1, charge=False, aggr="add", precision=32)


def race(functions, rounds, device):
    """{name: function} -> {name: seconds of each round}, in turns; first calls do not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    warm_up = 3 if device.type == "cuda" else 1  # CUDA graphs are recorded after the first
    times = {name: [] for name in functions}
    for count in range(warm_up + rounds):
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if count >= warm_up:
                times[name].append(time.perf_counter() - began)
    return times


def peer_of(model):
    """TorchMD-NET's model with the weights of a PropertyModel; None if it is not installed."""
    if not find_spec("torchmdnet"):
        return None
    with explain("torchmd-net cannot be imported, install it again or remove it", ImportError):
        from torchmdnet.models.model import create_model

    size = "embedding_dimension num_layers num_rbf num_heads cutoff_upper max_z vector_cutoff"
    peer = create_model(PEER | {name: getattr(model.encoder.config, name) for name in size.split()})
    ours = {f"representation_model.{key}": w for key, w in model.encoder.state_dict().items()}
    ours |= {f"output_model.{key}": w for key, w in model.head.state_dict().items()}
    theirs = peer.state_dict()
    matched = {key: ours.get(key.replace("update_net.layers.", "update_net.")) for key in theirs}
    if unknown := [key for key, _ in peer.named_parameters() if matched[key] is None]:
        raise InputError(f"torchmd-net has other weights than 3.1.0: {', '.join(unknown)}")
    peer.load_state_dict({key: theirs[key] if w is None else w for key, w in matched.items()})
    return peer


def random_molecules(path, number, device, forces=False):
    """`number` random molecules of a file -> the arrays of Molecules.read on the device."""
    molecules = Molecules(path)
    index = choose(molecules, "", number, "molecules to be timed")
    molecules.check_elements(index, WIDE.max_z)
    return {key: value.to(device) for key, value in molecules.read(index, forces).items()}


def with_backward(outputs, module):
    """The backward pass of the mean squares of all outputs."""
    sum(output.square().mean() for output in outputs).backward()
    module.zero_grad()


def encode(model, mol, training):
    """The encoder alone, with its backward pass if training."""
    encoder = model.encoder if isinstance(model, PropertyModel) else model.representation_model
    with torch.set_grad_enabled(training):
        x, vec, *_ = encoder(mol["z"], mol["pos"], mol["batch"])
    if training:
        with_backward((x, vec), encoder)


def energy_and_forces(model, mol, training):
    """Energies and forces; if training, the gradient of their mean square errors, too."""
    num_molecules = int(mol["batch"][-1]) + 1
    if isinstance(model, PropertyModel):
        energy, forces = model(mol["z"], mol["pos"], mol["batch"], num_molecules, forces=True)
    else:  # the peer marks the positions that it is given as to be differentiated by
        energy, forces = model(mol["z"], mol["pos"].clone(), mol["batch"])
    if training:
        with_backward((energy, forces - mol["forces"]), model)


def contenders(what, model_config, file, number, training, config, device):
    """Ours, ours compiled and the peer, on `number` molecules of config.<file>, if there is one."""
    path, forces = getattr(config, file), what is energy_and_forces
    if not path:
        return {}
    mol = random_molecules(path, number, device, forces)
    torch.manual_seed(0)
    encoder = new_encoder(model_config)
    model = PropertyModel(encoder, "scalar", "sum", torch.zeros(model_config.max_z)).to(device)
    models = {"ours": model, "compiled": copy.deepcopy(model)}
    if forces:
        models["compiled"].compile_derivative(device)
    else:
        compile_layers(models["compiled"].encoder, device)
    if peer := peer_of(model):
        models["peer"] = peer.to(device)
    if forces:
        for one in models.values():
            one.train(training).requires_grad_(training)
    return {name: partial(what, one, mol, training) for name, one in models.items()}


OBJECTIVES = {"coord": {"objective": "coord"}, "georecon": {}, "georecon, alpha 1.2": {"alpha": 1.2}}
FAMILY = OBJECTIVES | {name: {"objective": name} for name in ("rec_only", "frad")}
FAMILY["scd"] = {"objective": "scd", "model": ModelConfig(backbone="adaptive")}
COMPILED = {"": {}, ", compiled": {"compile": True}}
NETWORKS = {", whiten": {"model": ModelConfig(**WHITEN)}, ", painn": {"model": ModelConfig(backbone="painn")}}


def pretraining_step(device, molecules_of, number, **settings):
    """A step of pretraining with these settings, as a function."""
    stage = PretrainConfig(batch_size=number * (4 if device.type == "cuda" else 1), **settings)
    molecules = molecules_of(objective_of(stage).inputs)
    model = make_model(stage, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    parts = StepBatches(molecules, np.arange(len(molecules)), stage.batch_size, stage.seed)[0]

    def step():
        train_step(model, parts, 0, stage, device, 1)
        optimizer.step()
        optimizer.zero_grad()

    return step


def pretrain_contenders(objectives, kinds, number, config, device):
    """A step of each objective in each kind of settings; of frad if there are rotors."""
    with h5py.File(config.small, "r") as file:
        names = [name for name in objectives if name != "frad" or "rotor" in file]
    step = partial(pretraining_step, device, partial(Molecules, config.small), number)
    pairs = [(n, kind) for kind, n in product(kinds, names) if not objectives[n].keys() & kinds[kind].keys()]
    return {n + kind: step(**objectives[n], **kinds[kind]) for n, kind in pairs}


PAIRS = list(product(("small", "larger"), ("forward", "step")))
WORKLOADS = {
    "encoder": {f"encoder, {f}, {k}": partial(contenders, encode, WIDE, f, 50, k == "step") for f, k in PAIRS},
    "pretrain": {"pretrain": partial(pretrain_contenders, OBJECTIVES, COMPILED, 50)},
    "family": {"family": partial(pretrain_contenders, FAMILY, {"": {}} | NETWORKS, 25)},
    "forces": {f"forces, {n} frames": partial(contenders, energy_and_forces, FORCES, "md17", n, True) for n in (4, 32)},
    "md": {"md, 1 frame": partial(contenders, energy_and_forces, FORCES, "md17", 1, False)},
}


def compare(case, config):
    """The contenders of each workload of a case in turns, beside a reference if it is there."""
    device, rounds = torch.device(config.device), config.rounds * (10 if case == "md" else 1)
    for workload, contenders_of in WORKLOADS[case].items():
        times = race(contenders_of(config, device), rounds, device)
        reference = times.get("coord" if case in ("pretrain", "family") else "peer")
        for name, found in times.items():
            row = {"case": workload, "contender": name, "seconds": statistics.median(found)}
            if reference and found is not reference:
                row["times_faster"] = statistics.median(a / b for a, b in zip(reference, found, strict=True))
            yield row


def main(arguments):
    chosen, config = read_arguments(BenchmarkConfig, arguments)
    chosen, device = chosen or list(WORKLOADS), torch.device(config.device)
    if unknown := [case for case in chosen if case not in WORKLOADS]:
        raise InputError(f"no case {unknown[0]!r}: there are {', '.join(WORKLOADS)}", code=2)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = cuda: torch finds no GPU", code=2)
    for path in filter(None, (config.small, config.larger, {"forces", "md"} & {*chosen} and config.md17)):
        random_molecules(path, 50, torch.device("cpu"), forces=path == config.md17)
    check_new(config.out, make_folder=True)
    torch.set_num_threads(config.threads)
    tune_cpu()
    peer = version("torchmd-net") if find_spec("torchmdnet") else "not installed"
    print(f"torchmd-net: {peer}\n{'':<56}{'time':>18}{'faster':>9}")
    about = provenance(device) | {"peer": peer, "settings": asdict(config)}
    cases = {}
    for case in chosen:
        rows = []
        for row in compare(case, config):
            rows.append(row)
            faster = f"{row['times_faster']:.2f}" if "times_faster" in row else ""
            name = f"{row['case']:<26}{row['contender']:<30}"
            print(f"{name}{1000 * row['seconds']:>15.1f} ms{faster:>9}", flush=True)
        cases[case] = about | {"rows": rows}
        write_json(Path(config.out), cases)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    cli(main, __doc__)

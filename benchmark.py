"""How fast this code is: against TorchMD-NET's own on the same weights and molecules, and against the machine.

    python benchmark.py                                   every case; half an hour on a fast core
    python benchmark.py encoder forces larger=FILE.h5     some cases, with larger molecules of your own
    python benchmark.py device=cuda

encoder    forward, and forward + backward, 256 channels, 8 layers: 50 molecules of `small`, 50 of `larger`
pretrain   a step of Coord, of GeoRecon, of GeoRecon with alpha = 1.2
forces     a training step of energies and forces, 128 channels, 6 layers: 4 and 32 frames of `md17`
md         energy and forces of one frame, as dynamics asks for them
loader     reading batches from a file of 3.4 million molecules
lipschitz  the Lipschitz constants of 100 molecules, at once and one by one from the exact Jacobian
ranks      pretraining with one process, with two ranks, and by two runs that do not know of each other
growth     the encoder with more atoms in a molecule, and with more molecules in a batch

Times are medians of interleaved rounds on one thread, ratios medians of the rounds' ratios. The peer is
torchmd-net 3.1.0, if it is installed beside this (pip install torchmd-net==3.1.0 ase, 5 GB with torch). What limits:
`arithmetic`, the multiply-adds of all matrix products at the rate of a large product on this machine; `bytes`, what the
uncompiled operations read and write, each on its own, at the rate of a large copy. Each case is
written to `out` when it is done, in the place of what that file held of it.
"""

import copy
import importlib.metadata
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import lipschitz
from data import InputError, Molecules, StepBatches, cli
from finetune import PropertyModel
from model import EquivariantTransformer, ModelConfig, setting
from pretrain import (
    PretrainConfig,
    build_config,
    check_max_z,
    compile_layers,
    make_model,
    provenance,
    train_step,
    tune_cpu,
    write_text,
)


@dataclass(frozen=True)
class BenchmarkConfig:
    small: str = "data/qm9_demo.h5"  # molecules of about 18 atoms
    larger: str = ""  # file of molecules of about 33 atoms; empty: its rows are left out
    md17: str = "data/ethanol_demo.h5"  # frames of one molecule with energies and forces
    device: str = setting("cpu", choices=("cpu", "cuda"))
    rounds: int = setting(5, low=1)
    out: str = "out/benchmark.json"


PUBLISHED = dict(x_norm_layer=False, vec_norm_layer="none", vec_norm_out="none")  # TorchMD-NET has no such norms
WIDE = ModelConfig(**PUBLISHED)
FORCES = ModelConfig(embedding_dimension=128, num_layers=6, num_rbf=32, **PUBLISHED)


# ---------------------------------------------------------------- the machine


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


def race(contenders, rounds, device):
    """{name: function} -> {name: seconds of each round}, in turns; the first calls of each do not count."""
    for function in contenders.values():
        for _ in range(3 if device.type == "cuda" else 1):  # CUDA graphs are recorded after the first
            function()
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            times[name].append(seconds(function, device))
    return times


def machine(device):
    """-> multiply-adds of a large matrix product, bytes of a large copy, each per second."""
    a = torch.rand(2048, 2048, device=device)
    block = torch.rand(1 << 26, device=device)  # 256 MiB: no cache holds it
    target = torch.empty_like(block)
    times = race({"product": lambda: a @ a, "copy": lambda: target.copy_(block)}, 5, device)
    return 2048**3 / statistics.median(times["product"]), 2 * 4 * len(block) / statistics.median(times["copy"])


def bfloat16_is_fast(device):
    """Whether the machine has instructions for it: without them it is ten times slower than float32."""
    a = torch.rand(512, 512, device=device)
    b = a.bfloat16()
    times = race({"float32": lambda: a @ a, "bfloat16": lambda: b @ b}, 3, device)
    return min(times["bfloat16"]) < min(times["float32"])


class Count(TorchDispatchMode):
    """Multiply-adds of the matrix products inside, and bytes that operations read and write, each on its own."""

    multiply_adds = moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.multiply_adds += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out) / 2
        read = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in read}
        # a view moves nothing
        if func._schema.is_mutable or any(t.untyped_storage().data_ptr() not in known for t in made):
            self.moved += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in read + made)
        return out


def limits(function, rates):
    """Seconds that the function's matrix products take at the machine's rate, and its operations' bytes at its rate."""
    with Count() as count:
        function()
    return {"arithmetic": count.multiply_adds / rates[0], "bytes": count.moved / rates[1]}


# ---------------------------------------------------------------- the peer


def peer_is_installed():
    return importlib.util.find_spec("torchmdnet") is not None


def peer_of(model):
    """TorchMD-NET's model with the weights of a PropertyModel; None if it is not installed."""
    if not peer_is_installed():
        return None
    try:
        from torchmdnet.models.model import create_model
    except ImportError as error:
        raise InputError(f"torchmd-net cannot be imported, {error}: install or remove it") from None

    c = model.encoder.config
    peer = create_model(
        dict(embedding_dimension=c.embedding_dimension, num_layers=c.num_layers, num_rbf=c.num_rbf)
        | dict(num_heads=c.num_heads, cutoff_lower=0.0, cutoff_upper=c.cutoff_upper, max_z=c.max_z)
        | dict(model="equivariant-transformer", output_model="Scalar", prior_model=None, derivative=True)
        | dict(rbf_type="expnorm", trainable_rbf=False, activation="silu", attn_activation="silu")
        | dict(neighbor_embedding=True, distance_influence="both", vector_cutoff=False, precision=32)
        | dict(max_num_neighbors=128, aggr="add", reduce_op="add", static_shapes=False, check_errors=True)
        | dict(box_vecs=None, atom_filter=-1, charge=False, spin=False)
    )
    ours = {f"representation_model.{key}": value for key, value in model.encoder.state_dict().items()}
    ours |= {f"output_model.{key}": value for key, value in model.head.state_dict().items()}
    theirs = peer.state_dict()
    matched = {key: ours.get(key.replace("update_net.layers.", "update_net.")) for key in theirs}
    unknown = [key for key, _ in peer.named_parameters() if matched[key] is None]
    if unknown:
        raise InputError(f"torchmd-net has other weights than 3.1.0: {', '.join(unknown)}")
    peer.load_state_dict({key: theirs[key] if value is None else value for key, value in matched.items()})
    return peer


# ---------------------------------------------------------------- workloads: {contender: function}


def some(path, number, device, forces=False):
    """`number` random molecules of a file -> the arrays of Molecules.read on the device."""
    molecules = Molecules(path)
    if len(molecules) < number:
        raise InputError(f"{path} holds {len(molecules)} molecules, this takes {number} or more")
    index = np.random.default_rng(0).permutation(len(molecules))[:number]
    mol = molecules.read(index, forces)
    check_max_z(mol["z"], WIDE.max_z, path)
    return {key: value.to(device) for key, value in mol.items()}


def property_model(config, device):
    torch.manual_seed(0)
    return PropertyModel(EquivariantTransformer(config), "scalar", "sum", torch.zeros(config.max_z)).to(device)


def encode(encoder, training, bf16, mol, parts=1):
    """A forward pass, with its backward pass if training; in `parts`, which is what `accumulate` does for memory."""
    molecules = int(mol["batch"][-1]) + 1
    for part in range(parts):
        first, stop = part * molecules // parts, (part + 1) * molecules // parts
        of = (mol["batch"] >= first) & (mol["batch"] < stop)
        z, pos, batch = mol["z"][of], mol["pos"][of], mol["batch"][of] - first
        with torch.set_grad_enabled(training), torch.autocast(pos.device.type, torch.bfloat16, enabled=bf16):
            x, vec, *_ = encoder(z, pos, batch)
        if training:
            (x.square().mean() + vec.square().mean()).backward()
    encoder.zero_grad()


def encoder_work(file, training, config):
    """The encoder on 50 molecules of config.<file>."""
    device = torch.device(config.device)
    mol = some(getattr(config, file), 50, device)
    model = property_model(WIDE, device)
    compiled = copy.deepcopy(model.encoder)
    compile_layers(compiled, device)
    work = {"ours": partial(encode, model.encoder, training, False, mol)}
    work["compiled"] = partial(encode, compiled, training, False, mol)
    if training:
        work["in 4 parts"] = partial(encode, model.encoder, training, False, mol, 4)
        if bfloat16_is_fast(device):
            work["bf16"] = partial(encode, model.encoder, training, True, mol)
            work["bf16, compiled"] = partial(encode, compiled, training, True, mol)
    if peer := peer_of(model):
        work["peer"] = partial(encode, peer.representation_model.to(device), training, False, mol)
    return work


OBJECTIVES = {"coord": {"objective": "coord"}, "georecon": {}, "georecon, alpha 1.2": {"alpha": 1.2}}


def pretrain_work(config):
    device, work = torch.device(config.device), {}
    molecules = Molecules(config.small)
    for name, settings in OBJECTIVES.items():
        for compiled in (False, True):
            of = PretrainConfig(batch_size=50, compile=compiled, **settings)
            model = make_model(of, device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
            parts = StepBatches(molecules, np.arange(len(molecules)), of.batch_size, of.seed)[0]

            def step(model=model, optimizer=optimizer, parts=parts, of=of):
                train_step(model, parts, 0, device, of, 1)
                optimizer.step()
                optimizer.zero_grad()

            work[f"{name}, compiled" if compiled else name] = step
    return work


def energy_and_forces(model, mol, training):
    """Energies and forces of the molecules; if training, the gradient of their mean square errors, too."""
    num = int(mol["batch"][-1]) + 1
    if isinstance(model, PropertyModel):
        energy, forces = model(mol["z"], mol["pos"], mol["batch"], num, forces=True)
    else:  # the peer marks the positions that it is given as to be differentiated by
        energy, forces = model(mol["z"], mol["pos"].clone(), mol["batch"])
    if training:
        (energy.square().mean() + (forces - mol["forces"]).square().mean()).backward()
        model.zero_grad()


def forces_work(number, training, config):
    device = torch.device(config.device)
    mol = some(config.md17, number, device, forces=True)
    model = property_model(FORCES, device).train(training).requires_grad_(training)
    compiled = copy.deepcopy(model)
    compiled.compile_derivative(device)
    work = {"ours": partial(energy_and_forces, model, mol, training)}
    work["compiled"] = partial(energy_and_forces, compiled, mol, training)
    if peer := peer_of(model):
        peer = peer.to(device).train(training).requires_grad_(training)
        work["peer"] = partial(energy_and_forces, peer, mol, training)
    return work


def cluster(mol, atoms):
    """Copies of a molecule on a cubic lattice, nearly touching, cut off at `atoms`: one large molecule."""
    pos, copies = mol["pos"] - mol["pos"].mean(0), -(-atoms // len(mol["z"]))
    side = round(copies ** (1 / 3) + 0.499)
    spacing = 1.0 + float((pos.amax(0) - pos.amin(0)).max())  # angstrom
    cells = torch.cartesian_prod(*[torch.arange(side, device=pos.device)] * 3)[:copies] * spacing  # (c, 3)
    pos = (pos.unsqueeze(0) + cells.unsqueeze(1)).reshape(-1, 3)[:atoms]
    return {"z": mol["z"].repeat(copies)[:atoms], "pos": pos, "batch": torch.zeros_like(pos[:, 0]).long()}


ATOMS, MOLECULES = (10, 25, 50, 100, 200, 400), (10, 20, 50, 100, 200)


def growth_work(of, config):
    """128 channels, 6 layers, forward and backward: ever larger clusters of one molecule, ever more molecules."""
    device = torch.device(config.device)
    model = property_model(FORCES, device).encoder
    if of == "atoms":
        work = {atoms: cluster(some(config.small, 1, device), atoms) for atoms in ATOMS}
    else:
        work = {number: some(config.small, number, device) for number in MOLECULES}
    return {str(size): partial(encode, model, True, False, mol) for size, mol in work.items()}


WORKLOADS = {
    "encoder, small, forward": partial(encoder_work, "small", False),
    "encoder, small, step": partial(encoder_work, "small", True),
    "encoder, larger, forward": partial(encoder_work, "larger", False),
    "encoder, larger, step": partial(encoder_work, "larger", True),
    "pretrain": pretrain_work,
    "forces, 4 frames": partial(forces_work, 4, True),
    "forces, 32 frames": partial(forces_work, 32, True),
    "md, 1 frame": partial(forces_work, 1, False),
    "growth, atoms": partial(growth_work, "atoms"),
    "growth, molecules": partial(growth_work, "molecules"),
}


def process_mib(key):
    """Memory of this process, on Linux: VmRSS now, VmHWM at most. getrusage would count what the parent had."""
    status = Path("/proc/self/status")
    return int(status.read_text().partition(f"{key}:")[2].split()[0]) / 2**10 if status.exists() else math.nan


def peak_mib(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else process_mib("VmHWM")


def run(command, what, **options):
    """Run a command -> what it printed; an InputError with its last line if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        ended = f"exit code {done.returncode}" if done.returncode > 0 else f"killed by signal {-done.returncode}"
        said = done.stderr.strip().splitlines() or [ended]  # torchrun says more below our line
        raise InputError(f"{what}: {next((line for line in said if 'error: ' in line), said[-1])}")
    return done.stdout


ALONE = "GEORECON_BENCHMARK_ALONE"  # in a process of our own: what it is to measure


def alone(workload, contender, allocator, settings, rounds, **environment):
    """One contender in a process of its own, with our allocator settings or the default's -> seconds, MiB it adds.

    To be called before `compare`, whose process keeps the memory that it had.
    """
    command = [sys.executable, __file__, *settings, f"rounds={rounds}"]
    environment = os.environ | environment | {ALONE: json.dumps([workload, contender, allocator])}
    return json.loads(run(command, f"{workload}, {contender}", env=environment).splitlines()[-1])


def run_alone(workload, contender, allocator, config):
    if allocator == "ours":
        tune_cpu()
    if workload == "loader":
        return print(json.dumps(read_two_epochs(config)))
    device = torch.device(config.device)
    function = WORKLOADS[workload](config)[contender]
    before = peak_mib(device)
    times = race({contender: function}, config.rounds, device)[contender]
    print(json.dumps({"seconds": statistics.median(times), "mib": peak_mib(device) - before}))


# ---------------------------------------------------------------- cases


def compare(workload, reference, config, rates):
    """The contenders of a workload in turns, beside the reference if it is there -> rows."""
    device = torch.device(config.device)
    work = WORKLOADS[workload](config)
    times = race(work, config.rounds, device)
    plain = {name: limits(work[name], rates) for name in ("ours", *OBJECTIVES) if name in work}
    rows = []
    for name in work:
        row = {"case": workload, "contender": name, "seconds": statistics.median(times[name])}
        if reference in times and name != reference:
            pairs = zip(times[reference], times[name], strict=True)
            row["times_faster"] = statistics.median(a / b for a, b in pairs)
        if name in plain:
            row["limits"] = plain[name]
        elif known := plain.get("ours" if name == "compiled" else name.removesuffix(", compiled")):
            row["limits"] = {"arithmetic": known["arithmetic"]}  # the same products, other bytes
        if "limits" in row:
            row["times_limits"] = {key: row["seconds"] / value for key, value in row["limits"].items()}
        rows.append(row)
    return rows


def encoder(config, rates, settings):
    for file, of in product(("small", "larger") if config.larger else ("small",), ("forward", "step")):
        workload = f"encoder, {file}, {of}"
        measured = ["ours", "compiled", "in 4 parts", *(["peer"] if peer_is_installed() else [])]
        apart = {name: alone(workload, name, "ours", settings, 1) for name in measured if of == "step"}
        installed = peer_is_installed() and alone(workload, "peer", "default", settings, config.rounds)
        for row in compare(workload, "peer", config, rates):
            if row["contender"] in apart:
                row["mib"] = apart[row["contender"]]["mib"]
            if installed:
                row["times_faster_installed"] = installed["seconds"] / row["seconds"]
            yield row
        if installed:
            yield {"case": workload, "contender": "peer, as installed", **installed}


def pretrain(config, rates, settings):
    yield from compare("pretrain", "coord", config, rates)


def forces(config, rates, settings):
    for frames in (4, 32):
        yield from compare(f"forces, {frames} frames", "peer", config, rates)


def md(config, rates, settings):
    yield from compare("md, 1 frame", "peer", replace(config, rounds=10 * config.rounds), rates)


def write_copies(small, copies, path):
    """A file of all molecules of `small`, again and again."""
    atoms = small.read(np.arange(len(small)))
    with h5py.File(path, "w") as file:
        file.attrs.update(small.attrs)
        for name, value in (("z", atoms["z"].numpy().astype(np.uint8)), ("pos", atoms["pos"].numpy())):
            dataset = file.create_dataset(name, (copies * len(value), *value.shape[1:]), value.dtype)
            for k in range(copies):
                dataset[k * len(value) : (k + 1) * len(value)] = value
        file["ptr"] = np.concatenate([[0], np.tile(np.diff(small.ptr), copies).cumsum()])
        file["id"] = np.arange(copies * len(small))


def loader(config, rates, settings):
    """Two epochs of a file of 3.4 million molecules that the system has cached, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:  # ours, since a process that is killed leaves its own behind
        found = alone("loader", "one process", "ours", settings, 1, TMPDIR=folder)
    yield {"case": "loader", "contender": "one process", **found}


def read_two_epochs(config):
    """Batches of 200 from the molecules of `small`, written again and again -> molecules a second, MiB that it grows.

    Memory is compared from the 500th batch, when all that is kept has been made, to the last of the second epoch.
    """
    small = Molecules(config.small)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/large.h5"
        try:
            write_copies(small, -(-3_400_000 // len(small)), path)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{folder}: no room for a file of 3.4 million molecules: {error}") from None
        molecules = Molecules(path)
        batches = StepBatches(molecules, np.arange(len(molecules)), 200, seed=1)
        began, steps = time.perf_counter(), 2 * len(molecules) // 200
        for step in range(steps):
            batches[step]
            if step == 500:
                before = process_mib("VmRSS")
        elapsed, grown = time.perf_counter() - began, process_mib("VmRSS") - before
    return {"per_second": steps * 200 / elapsed, "mib": grown}


def lipschitz_constants(config, rates, settings):
    """64 channels, 4 layers, fresh weights, in float64: 25 iterations for 100 molecules, whole Jacobians for 10."""
    torch.manual_seed(0)
    model = EquivariantTransformer(ModelConfig(embedding_dimension=64, num_layers=4, num_rbf=32)).double()
    of = lipschitz.LipschitzConfig(data=config.small, num_molecules=100)
    device = torch.device(config.device)
    model = model.to(device).requires_grad_(False)
    molecules, index = lipschitz.choose(of)
    ones = torch.ones(64, dtype=torch.float64, device=device)
    together, few = (list(lipschitz.batches(molecules, part, of, device)) for part in (index, index[::10]))
    found = {}

    def measure(name, parts, of):
        found[name] = torch.cat([lipschitz.last_of(lipschitz.constants(model, part, ones, of))[:, 0] for part in parts])

    work = {
        "at once": partial(measure, "at once", together, of),
        "one by one": partial(measure, "one by one", few, replace(of, exact=True)),
    }
    times = race(work, 1, device)
    exact = 10 * statistics.median(times["one by one"])  # seconds for 100
    error = (found["at once"][::10] / found["one by one"] - 1).abs().max().item()
    fast = statistics.median(times["at once"])
    row = {"case": "lipschitz, 100", "contender": "at once", "seconds": fast, "times_faster": exact / fast}
    yield row | {"largest_error": error}
    yield {"case": "lipschitz, 100", "contender": "one by one", "seconds": exact}


def ranks(config, rates, settings):
    """Steps of configs/qm9_small.yaml: one process, two ranks, and two runs apart, which is what the machine allows."""
    if config.device == "cuda" and torch.cuda.device_count() < 2:
        return
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": Path(__file__).parent}
    pretraining = ["pretrain.py", "configs/qm9_small.yaml", f"data={Path(config.small).resolve()}", "val_size=32"]
    pretraining += ["max_steps=100", "log_every=20", "num_workers=0"]

    def molecules_per_s(world, *more):
        with tempfile.TemporaryDirectory() as folder:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
            run([*launch, *pretraining, f"out_dir={folder}/run", *more], f"pretrain.py on {world} ranks", **options)
            log = [json.loads(line) for line in Path(folder, "run/log.jsonl").read_text().splitlines()]
        return statistics.median(record["molecules_per_s"] for record in log if record["split"] == "train")

    for form, more in (("", []), (", compiled", ["compile=true"])):
        rate = {"1 process": [], "2 ranks": [], "2 runs apart": []}
        for _ in range(config.rounds):
            rate["1 process"].append(molecules_per_s(1, *more))
            rate["2 ranks"].append(molecules_per_s(2, *more))
            with ThreadPoolExecutor(2) as pool:
                apart = [pool.submit(molecules_per_s, 1, *more) for _ in range(2)]
            rate["2 runs apart"].append(sum(one.result() for one in apart))
        for name, found in rate.items():
            row = {"case": f"ranks{form}", "contender": name, "per_second": statistics.median(found)}
            if name != "1 process":
                pairs = zip(found, rate["1 process"], strict=True)
                row["times_faster"] = statistics.median(many / one for many, one in pairs)
            yield row


def growth(config, rates, settings):
    """Each size in a process of its own, for its memory."""
    for workload, sizes in (("growth, atoms", ATOMS), ("growth, molecules", MOLECULES)):
        for size in sizes:
            found = alone(workload, str(size), "ours", settings, config.rounds)
            yield {"case": workload, "contender": str(size), **found}


CASES = {"encoder": encoder, "pretrain": pretrain, "forces": forces, "md": md, "loader": loader}
CASES |= {"lipschitz": lipschitz_constants, "ranks": ranks, "growth": growth}


# ---------------------------------------------------------------- table


def line(row):
    """A row of the table on the terminal."""
    took = f"{1000 * row['seconds']:.1f} ms" if "seconds" in row else f"{row['per_second']:,.0f} a second"
    limit = ", ".join(f"{value:.1f} {name}" for name, value in row.get("times_limits", {}).items())
    ratios = ((row.get("times_faster"), 9), (row.get("times_faster_installed"), 11))
    faster = "".join(" " * width if ratio is None else f"{ratio:>{width}.2f}" for ratio, width in ratios)
    memory = f"{row['mib']:>8.0f} MiB" if "mib" in row else " " * 12
    return f"{row['case']:<26}{row['contender']:<30}{took:>18}{faster}{memory}  {limit}".rstrip()


def read_known(out):
    """{case: what a file of this program holds of it}; read again for each case, another run may write to it too."""
    known = json.loads(out.read_text()) if out.exists() else {}
    if type(known) is not dict or any(
        case not in CASES or not isinstance(found["rows"], list) for case, found in known.items()
    ):
        raise ValueError("holds something else")
    return known


def main(arguments):
    settings = [argument for argument in arguments if "=" in argument]
    config = build_config(BenchmarkConfig, dict(argument.split("=", 1) for argument in settings))
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device = cuda: torch finds no GPU", code=2)
    if config.device == "cpu":
        torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files and processes of our own end with us
    if os.environ.get(ALONE):
        return run_alone(*json.loads(os.environ[ALONE]), config)
    chosen = [argument for argument in arguments if "=" not in argument] or list(CASES)
    if unknown := [case for case in chosen if case not in CASES]:
        raise InputError(f"no case {unknown[0]!r}: there are {', '.join(CASES)}", code=2)
    some(config.small, 200, torch.device("cpu"))
    if config.larger:
        some(config.larger, 50, torch.device("cpu"))
    if {"forces", "md"} & set(chosen):
        some(config.md17, 32, torch.device("cpu"), forces=True)
    out = Path(config.out)
    try:
        read_known(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(f"out = {out}: {error}: name a file of this program, or a new one", code=2) from None
    tune_cpu()
    device = torch.device(config.device)
    peer = f"torchmd-net {importlib.metadata.version('torchmd-net')}" if peer_is_installed() else "not installed"
    rates = machine(device)
    print(f"peer: {peer}; products {rates[0] / 1e9:.0f} GMAC/s, copies {rates[1] / 1e9:.1f} GB/s")
    print(f"{'':<56}{'time':>18}{'faster':>9}{'installed':>11}{'memory':>12}  times the limit")
    about = provenance(device, 1) | {"peer": peer, "multiply_adds_per_s": rates[0], "bytes_per_s": rates[1]}
    about |= {"settings": asdict(config)}
    for case in chosen:
        rows = []
        for row in CASES[case](config, rates, settings):
            rows.append(row)
            print(line(row), flush=True)
        write_text(out, json.dumps(read_known(out) | {case: about | {"rows": rows}}, indent=1) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    cli(main, __doc__)

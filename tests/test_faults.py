"""What happens when: kills, signals, dead ranks, full disks, two runs in one folder, jumping clocks, planted NaN.

The short form runs with the other tests; the whole suite, half an hour on two cores, is
`pytest tests/test_faults.py tests/test_bad_input.py -m "slow or not slow"`.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

import finetune
import pretrain
from data import Molecules, split_indices
from harness import errors, run
from harness.errors import InputError, cli
from harness.folder import Log
from harness.settings import load_config

ROOT = Path(__file__).parent.parent
COMMON = {
    "batch_size": 8,
    "max_steps": 60,
    "lr": 1e-3,
    "lr_warmup_steps": 5,
    "lr_cosine_length": 60,
    "log_every": 1,
    "val_every": 20,
    "save_every": 3,
    "model": {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4},
}
STAGES = {
    "pretrain": {**COMMON, "data": str(ROOT / "data/qm9_demo.h5"), "val_size": 30},
    "finetune": {
        **COMMON,
        **{"data": str(ROOT / "data/ethanol_demo.h5"), "target": "energy_forces"},
        **{"train_size": 200, "val_size": 10, "test_size": 10},
    },
}


@pytest.fixture(params=STAGES)
def stage(request, tmp_path, monkeypatch):
    """The name of a stage, with a config <stage>.yaml in a folder of its own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, settings in STAGES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return request.param


def main(stage, *settings):
    """Run a stage in this process."""
    {"pretrain": pretrain, "finetune": finetune}[stage].main([f"{stage}.yaml", *settings])


def launch(stage, folder, *settings, ranks=1, options=(), limit=None):
    """Start a stage as a user does, plain or under torchrun, on one thread a rank, for equal bits."""
    command = [sys.executable]
    if ranks > 1 or options:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    command += [str(ROOT / f"{stage}.py"), f"{stage}.yaml", f"out_dir={folder}", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if ranks > 1 else {})

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job, as we may be, is told to ignore
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=prepare, **pipes)


def end(process):
    """Wait for a process -> exit code, what it said on stderr."""
    err = process.communicate(timeout=900)[1]
    return process.returncode, err


def finish(stage, folder, *settings, ranks=1):
    """Run to the end; one rank in this process, whose bits are those of a process of its own."""
    if ranks == 1:
        return main(stage, f"out_dir={folder}", *settings)
    code, err = end(launch(stage, folder, *settings, ranks=ranks))
    assert code == 0, err


def processes_of(folder):
    """Process ids whose command line names the folder, torchrun and its ranks and loaders."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"out_dir={folder}".encode() in words:
            found.append(int(path.parent.name))
    return found


def kill(folder):
    for pid in processes_of(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def step_of(folder):
    """Steps in the log so far."""
    log = Path(folder) / "log.jsonl"
    return log.read_bytes().count(b'"split": "train"') if log.exists() else 0


def wait_for_step(process, folder, step):
    """Until the log holds that many steps; whether the process is still at work then."""
    while process.poll() is None and step_of(folder) < step:
        time.sleep(0.002)
    return process.poll() is None


def weights(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def same_bits(a, b):
    """Whether two runs ended with the same weights and optimizer state, bit for bit."""
    a, b = weights(a), weights(b)
    states = [(a["optimizer"]["state"][k], b["optimizer"]["state"][k]) for k in a["optimizer"]["state"]]
    pairs = [(x[name], y[name]) for x, y in [*states, (a["state_dict"], b["state_dict"])] for name in x]
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in pairs)


def logged(folder):
    """The log without what the clock says."""
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("molecules_per_s", None)
    return records


def all_readable(folder):
    """Every file that has its final name is whole."""
    for path in Path(folder).glob("*.pt"):
        torch.load(path, weights_only=True)
    if (Path(folder) / "config.yaml").exists() and (text := (Path(folder) / "config.yaml").read_text()):
        assert "batch_size" in yaml.safe_load(text)
    if (Path(folder) / "metrics.json").exists():
        json.loads((Path(folder) / "metrics.json").read_text())


def go_on(folder):
    return ["resume=true"] if (Path(folder) / "config.yaml").exists() else []


# ---------------------------------------------------------------- killed


def kill_often(stage, tally, ranks, moments, *settings):
    """Kill a run at each moment, a function of (process, folder), go on after each; it ends as an undisturbed one."""
    finish(stage, "whole", *settings, ranks=ranks)
    killed = str(Path.cwd() / "killed")  # a name that no other test's process has on its command line
    for moment in moments:
        process = launch(stage, killed, *settings, *go_on(killed), ranks=ranks)
        moment(process, killed)
        assert process.poll() is None, "the run came to its end before it was killed"
        kill(killed)
        process.communicate()
        all_readable(killed)
        tally["kills survived"] += 1
    finish(stage, killed, *settings, *go_on(killed), ranks=ranks)
    assert same_bits("whole", killed)
    assert logged("whole") == logged(killed)
    assert not list(Path(killed).glob(".*.tmp"))


def test_killed_and_resumed_is_bitwise_the_same(stage, tally):
    def moment(process, folder):  # before the first checkpoint, then between two
        wait_for_step(process, folder, 25 if step_of(folder) else 2)

    kill_often(stage, tally, 1, [moment] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_twenty_random_moments(stage, tally, ranks):
    """Half of them a random time after the start, importing and reading too; half while a checkpoint is written."""
    rng = random.Random(f"{stage}{ranks}")

    def at_random(process, folder):
        deadline, last = time.monotonic() + rng.uniform(0, 4 + 4 * ranks), step_of(folder) + 40
        while time.monotonic() < deadline and step_of(folder) < last:  # on a fast machine it must not reach its end
            time.sleep(0.01)

    def while_writing(process, folder):
        first = step_of(folder)
        wait_for_step(process, folder, first + rng.randrange(1, 4))
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not list(Path(folder).glob(".*.pt.tmp")):
            time.sleep(0.0003)

    kill_often(stage, tally, ranks, [at_random, while_writing] * 10, "save_every=1", "max_steps=600")


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_run_after_its_step(stage, tally, number):
    process = launch(stage, "stopped", "save_every=1000")
    assert wait_for_step(process, "stopped", 5)
    process.send_signal(number)
    code, err = end(process)
    step = weights("stopped")["step"]
    assert code == 128 + number and step >= 5, err
    assert f"stopped by {number.name} after step {step}" in err and "resume=true" in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    tally["signals obeyed"] += 1
    finish(stage, "stopped", "resume=true")
    finish(stage, "whole")
    assert same_bits("whole", "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_torchrun_ends_both_ranks(stage, tally, number):
    stopped = str(Path.cwd() / "stopped")
    process = launch(stage, stopped, "save_every=1000", ranks=2)
    assert wait_for_step(process, stopped, 5)
    process.send_signal(number)
    code, err = end(process)
    step = weights(stopped)["step"]
    assert code != 0 and step >= 5 and f"after step {step}" in err
    assert not processes_of(stopped)
    tally["signals obeyed"] += 1
    finish(stage, stopped, "resume=true", ranks=2)
    finish(stage, "whole", ranks=2)
    assert same_bits("whole", stopped)


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again(stage, tally):
    """torchrun --max-restarts: all ranks start again and go on from last.pt by themselves."""
    finish(stage, "whole", ranks=2)
    process = launch(stage, "died", ranks=2, options=["--max-restarts=2"])  # not one more than ranks are lost
    for step in (10, 30):
        assert wait_for_step(process, "died", step)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        tally["ranks lost"] += 1
        time.sleep(1)
    code, err = end(process)
    assert code == 0, err
    assert same_bits("whole", "died")


# ---------------------------------------------------------------- files that cannot be written


@pytest.mark.slow
def test_a_disk_that_is_full_costs_no_checkpoint(stage, tally):
    finish(stage, "full", "max_steps=6")
    before = weights("full")
    size = (Path("full") / "last.pt").stat().st_size
    code, err = end(launch(stage, "full", "resume=true", "max_steps=60", limit=size // 2))
    assert code == 1 and "cannot be written" in err and "Traceback" not in err, err
    assert len(err.strip().splitlines()) == 1
    after = weights("full")
    assert after["step"] == before["step"] and not list(Path("full").glob(".*.tmp"))
    tally["full disks"] += 1
    finish(stage, "full", "resume=true", "max_steps=60")
    finish(stage, "whole")
    assert same_bits("whole", "full")


def test_a_log_that_cannot_be_written_ends_the_run_in_one_line(stage, tally, monkeypatch):
    class FullLog(Log):
        def __init__(self, path, *rest, **more):
            super().__init__(Path("/dev/full"), *rest, **more)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="/dev/full cannot be written: No space"):
        patch.setattr(run, "Log", FullLog)
        main(stage, "out_dir=run")
    tally["full disks"] += 1


def test_a_run_outlives_whoever_reads_its_output(stage, tally):
    """As of `pretrain.py ... | head -2`; log.jsonl has what can no longer be printed."""
    process = launch(stage, "piped")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0, process.stderr.read()
    process.stderr.close()
    assert step_of("piped") == 60 and Path("piped/metrics.json").exists()
    tally["closed pipes"] += 1


@pytest.mark.parametrize("work", ["torch.empty(2**47)", "numpy.ones(2**47)"])
def test_no_memory_is_one_line(work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    with pytest.raises(SystemExit) as ended:
        cli(lambda arguments: eval(work, {"torch": torch, "numpy": np}))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("pretrain.py: error: out of memory") and said.count("\n") == 1


def test_closed_streams_do_no_harm(tmp_path):
    """As of `data.py ... >&- 2>&-`: nothing to write to, and nothing else gets what was meant for them."""
    words = f"exec {sys.executable} {ROOT}/data.py sample {ROOT}/data/ethanol_demo.h5 out.h5 num=3 seed=1 >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], cwd=tmp_path).returncode == 0
    assert len(Molecules(tmp_path / "out.h5")) == 3 and len(list(tmp_path.iterdir())) == 1


def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "data.py"), "info", str(ROOT / "data/ethanol_demo.h5")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "data.py: error: standard output: No space left on device\n"


FAILURES = [
    (OSError(24, "Too many open files"), "system: Too many open files"),
    (RuntimeError("pair.cc:538] Connection closed by peer [127.0.0.1]:1"), "a rank was lost"),
    (RuntimeError("unbound_buffer.cc: Socket closed"), "a rank was lost"),
    (RuntimeError("[enforce fail] Application timeout caused pair closure"), "a rank was lost"),
    (RuntimeError("Timed out waiting 1800000ms for recv operation"), "a rank was lost"),
    (RuntimeError("pair.cc: writev [127.0.0.1]:1: Broken pipe"), "a rank was lost"),
    (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "a loader process"),
]


def test_a_bug_in_a_loader_process_keeps_its_traceback():
    def fail(argv):
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0. mat1 and mat2 shapes")

    with pytest.raises(RuntimeError, match="mat1"):
        cli(fail)


@pytest.mark.parametrize("error, said", FAILURES)
def test_a_failure_of_the_system_or_of_another_process_is_one_line(monkeypatch, capsys, error, said):
    def fail(*argv):
        raise error

    monkeypatch.setattr(errors, "mute", fail)  # it opens a file
    with pytest.raises(SystemExit) as ended:
        cli(fail)
    err = capsys.readouterr().err
    assert ended.value.code == 1 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("folder", ["/dev/full", "/dev/full/run", "/proc/run", "a_file/run"])
def test_a_folder_that_cannot_be_written(stage, tally, folder):
    Path("a_file").write_text("")
    with pytest.raises(InputError) as error:
        main(stage, f"out_dir={folder}")
    assert folder in str(error.value) and "\n" not in str(error.value)
    tally["unwritable folders"] += 1


@pytest.mark.slow
def test_of_two_runs_in_one_folder_one_is_refused(stage, tally):
    """Both new, then both resumed; which one goes on is chance, but there is exactly one."""
    for settings in ([], ["resume=true", "max_steps=80"]):
        both = [end(process) for process in [launch(stage, "both", *settings) for _ in range(2)]]
        (refused,) = [err for code, err in both if code]
        assert [code for code, _ in both if code] == [1] and len(refused.strip().splitlines()) == 1, refused
        tally["second runs refused"] += 1
    finish(stage, "whole")
    finish(stage, "whole", "resume=true", "max_steps=80")
    assert same_bits("whole", "both")


def test_left_over_variables_of_a_launcher_change_nothing(stage, monkeypatch):
    """A shell or a queue may export WORLD_SIZE; without RANK it does not make us one of several."""
    main(stage, "out_dir=whole", "max_steps=4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    main(stage, "out_dir=left", "max_steps=4")
    assert same_bits("whole", "left")
    for rank in ("0", "x", "7"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match="start with torchrun, or unset RANK"):
            main(stage, "out_dir=wrong")


def test_a_clock_that_jumps_changes_nothing(stage, tally, monkeypatch):
    main(stage, "out_dir=whole", "max_steps=10")
    rng = random.Random(0)
    with monkeypatch.context() as patch:
        for name in ("perf_counter", "time", "monotonic"):
            real = getattr(time, name)
            patch.setattr(time, name, lambda real=real: real() + rng.choice([0, -1e6, 1e6]))
        main(stage, "out_dir=jumped", "max_steps=10")
    assert same_bits("whole", "jumped")
    tally["clock jumps"] += 1


# ---------------------------------------------------------------- numbers that are none


def plant(source, dataset, row, value=np.nan):
    """A copy of an HDF5 file with one number spoilt."""
    path = Path(f"spoilt_{dataset.replace('/', '_')}.h5")
    shutil.copy(source, path)
    with h5py.File(path, "a") as file:
        file[dataset][row] = value
    return path


@pytest.mark.parametrize("dataset", ["pos", "forces", "energy"])
def test_a_number_in_the_data_that_is_none_is_caught_where_it_enters(stage, tally, dataset):
    settings = STAGES[stage]
    if stage == "pretrain" and dataset != "pos":
        pytest.skip("pretraining reads positions alone")
    molecules, molecule = Molecules(settings["data"]), 17
    if stage == "finetune":  # one that is trained on
        config = load_config(finetune.FinetuneConfig, ["finetune.yaml"])
        molecule = finetune.split_data(config, molecules)[0][5]
    row = molecule if dataset == "energy" else int(molecules.ptr[molecule]) + 1
    path = plant(settings["data"], dataset, row)
    with pytest.raises(InputError, match="not finite") as error:
        main(stage, f"data={path}", "max_steps=300", "log_every=100", "out_dir=spoilt")
    assert str(path) in str(error.value)
    assert not Path("spoilt/metrics.json").exists()
    tally["numbers caught"] += 1


def test_weights_that_are_not_finite_are_refused(stage, tally):
    main(stage, "out_dir=run", "max_steps=4")
    content = weights("run")
    name = next(key for key in content["state_dict"] if key.endswith("k_proj.weight"))
    content["state_dict"][name][0, 0] = torch.nan
    torch.save(content, "run/last.pt")
    with pytest.raises(InputError, match=f"run/last.pt: {name} is not finite"):
        main(stage, "out_dir=run", "max_steps=8", "resume=true")
    with pytest.raises(InputError, match="is not finite"):
        main("finetune", "out_dir=other", "init_from=run/last.pt")
    assert not Path("other").exists()
    tally["numbers caught"] += 1


def test_a_step_that_blows_up_names_its_molecules_and_keeps_the_last_good_state(stage, tally, monkeypatch):
    """From step 8 on the learning rate is absurd; the checkpoint of step 6 survives, and the run can go on from it."""
    module = {"pretrain": pretrain, "finetune": finetune}[stage]
    rate = module.learning_rate
    with monkeypatch.context() as patch, pytest.raises(InputError, match="the loss is .* at step .*json") as error:
        patch.setattr(module, "learning_rate", lambda step, config: 1e30 if step >= 7 else rate(step, config))
        main(stage, "out_dir=run", "log_every=5")
    named = json.loads(Path("run/not_finite.json").read_text())
    assert named["step"] == 9 and len(named["molecules"]) == 8 and "is from before" in str(error.value)
    assert weights("run")["step"] == 6
    main(stage, "out_dir=run", "resume=true")
    main(stage, "out_dir=whole")
    assert same_bits("run", "whole")
    tally["numbers caught"] += 1


def test_the_gradient_shows_in_the_log(stage):
    main(stage, "out_dir=run", "max_steps=3")
    norms = [record["grad_norm"] for record in logged("run") if record["split"] == "train"]
    assert len(norms) == 3 and all(norm > 0 for norm in norms)


# ---------------------------------------------------------------- a long life


@pytest.mark.slow
def test_loaders_leave_nothing_behind_when_their_parent_is_killed(stage):
    process = launch(stage, f"{Path.cwd()}/workers", "num_workers=2", "max_steps=100000")
    assert wait_for_step(process, "workers", 3)
    pids = processes_of(f"{Path.cwd()}/workers")
    assert len(pids) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while processes_of(f"{Path.cwd()}/workers") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(f"{Path.cwd()}/workers")
    assert not [name for name in os.listdir("/dev/shm") for pid in pids if f"_{pid}_" in name]


def test_an_error_in_a_loader_process_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = STAGES["pretrain"]
    Path("pretrain.yaml").write_text(yaml.safe_dump({**settings, "data": "bad.h5"}))
    Path("bad.h5").write_bytes(Path(settings["data"]).read_bytes())
    with h5py.File("bad.h5", "r+") as file:
        trained = split_indices(len(file["ptr"]) - 1, [settings["val_size"], None])[1]
        file["pos"][file["ptr"][trained[0]]] = np.nan
    process = launch("pretrain", f"{tmp_path}/workers", "num_workers=2", "max_steps=1000")
    try:
        err = process.communicate(timeout=120)[1]
    finally:
        for pid in processes_of(f"{tmp_path}/workers"):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 1 and "not finite" in err and "Traceback" not in err


def test_converters_leave_nothing_behind_when_their_parent_is_killed(tmp_path):
    busy = tmp_path / "busy"  # written by a worker: a scan of processes may see a fork that is gone a moment later
    command = ["sh", "-c", f"touch {busy}; sleep 30"]
    work = f"sources.parallel(subprocess.run, itertools.cycle({command}), chunk=3)"
    code = f"import itertools, subprocess; from formats import sources; list({work})"
    process = subprocess.Popen([sys.executable, "-c", code, f"out_dir={tmp_path}"], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not busy.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert busy.exists() and len(processes_of(tmp_path)) > 1
    process.kill()
    process.wait()
    time.sleep(1)
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_twenty_thousand_steps_take_no_more_memory_and_no_more_time(stage):
    """Time of the processor, which what else is at work there changes less than the clock's."""
    smallest = ["batch_size=2", "model.num_layers=1", "model.embedding_dimension=8"]
    smallest += ["objective=coord"] if stage == "pretrain" else ["target=energy"]
    rarely = ["log_every=200", "save_every=1000", "val_every=1000"]
    process = launch(stage, "long", "max_steps=20000", *smallest, *rarely)
    memory, seconds = [], []
    while process.poll() is None:
        if step_of("long") > len(memory):  # every 200 steps
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(status.partition("VmRSS:")[2].split()[0]))
            spent = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            seconds.append(sum(map(int, spent)) / os.sysconf("SC_CLK_TCK"))
        time.sleep(0.05)
    assert process.communicate() and process.returncode == 0 and len(memory) > 95
    assert np.median(memory[-20:]) < 1.05 * np.median(memory[10:30])
    each = np.diff(seconds)
    assert np.median(each[-30:]) < 1.4 * np.median(each[:30])

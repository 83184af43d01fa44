"""Stage 1: settings, the loop, resuming, ranks, bad input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import pretrain
from data import InputError, Molecules
from finetune import FinetuneConfig
from model import load_encoder
from pretrain import PretrainConfig, learning_rate, load_config, read_yaml, validation_batches

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "data/qm9_demo.h5"
TINY = {
    "data": str(DEMO),
    "val_size": 30,
    "batch_size": 8,
    "max_steps": 20,
    "lr": 1e-3,
    "lr_warmup_steps": 5,
    "lr_cosine_length": 20,
    "log_every": 1,
    "val_every": 10,
    "save_every": 7,
    "deterministic": torch.cuda.is_available(),  # on the CPU it always is
    "model": {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config file of a run of seconds, in a folder of its own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def launch(*arguments, ranks=0):
    """Start pretrain.py as a user does: plain, or under torchrun; on one thread, for equal bits."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # over gloo: two ranks would need two GPUs
    command += [str(ROOT / "pretrain.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def run(*arguments, ranks=0):
    process = launch(*arguments, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def read_log(folder, split="train"):
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def same_bits(a, b):
    """Whether two checkpoints hold the same weights and optimizer state, bit for bit."""
    a, b = (torch.load(Path(folder) / "last.pt", weights_only=True) for folder in (a, b))
    moments = [
        (a["optimizer"]["state"][k][m], b["optimizer"]["state"][k][m])
        for k, s in a["optimizer"]["state"].items()
        for m in s
    ]
    weights = [(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"]]
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in weights + moments)


# ---------------------------------------------------------------- settings


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def stage_of(path):
    """The dataclass of a config: shared bases are not runs, all else with a target is of finetune.py."""
    if path.stem in ("qm9", "md17"):
        return FinetuneConfig
    return FinetuneConfig if "target" in read_yaml(path) else PretrainConfig


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_its_resolved_form_loads_to_the_same(path, tmp_path):
    kind = stage_of(path)
    config = load_config(kind, [str(path)])
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump({**asdict(config), "keep_steps": list(config.keep_steps)}))
    assert load_config(kind, [str(saved)]) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_run_line_of_a_config_runs_that_config(path):
    header = path.read_text(encoding="utf-8")
    commands = re.findall(r"^# (?:run:)? +.*?(\w+\.py) (configs/\S+)", header, re.M)
    assert bool(commands) == ("\n# run:" in header) == ("Not a run of its own" not in header)
    script = {FinetuneConfig: "finetune.py", PretrainConfig: "pretrain.py"}[stage_of(path)]
    assert set(commands) <= {(script, f"configs/{path.name}")}


def test_table_13():
    qm9, md17 = (load_config(PretrainConfig, [str(ROOT / f"configs/{name}.yaml")]) for name in ("pcqm", "pcqm_md17"))
    assert (qm9.batch_size, qm9.lr, qm9.max_steps, qm9.position_noise_scale) == (200, 4e-4, 400_000, 0.04)
    assert (qm9.model.embedding_dimension, qm9.model.num_layers, qm9.model.num_rbf) == (256, 8, 64)
    assert (md17.batch_size, md17.lr_warmup_steps, md17.lr_cosine_length) == (280, 10_000, 400_000)
    assert (md17.model.embedding_dimension, md17.model.num_layers, md17.model.num_rbf) == (128, 6, 32)
    coord = load_config(PretrainConfig, [str(ROOT / "configs/pcqm_coord.yaml")])
    assert coord.objective == "coord" and coord.model == qm9.model  # equal footing


def test_values_take_the_type_of_their_field(tiny):
    tiny.write_text("data: x.h5\nlr: 1e-4\nprecision: 32\nkeep_steps: [10, 20]\n")
    config = load_config(PretrainConfig, [str(tiny), "lr_min=1e-6", "max_steps=1e5", "deterministic=true"])
    assert (config.lr, config.lr_min, config.max_steps, config.precision) == (1e-4, 1e-6, 100_000, "32")
    assert config.keep_steps == (10, 20) and config.deterministic is True
    assert load_config(PretrainConfig, [str(tiny), "keep_steps=5,6"]).keep_steps == (5, 6)
    assert load_config(PretrainConfig, [str(tiny), "model.num_layers=3"]).model.num_layers == 3


BAD_SETTINGS = [
    ("max_step=5", "did you mean max_steps"),
    ("model.num_layer=5", "did you mean model.num_layers"),
    ("lr=fast", "lr = 'fast': must be float"),
    ("lr=nan", "must be float"),
    ("lr=-1", "lr = -1.0: must be at least 0"),
    ("max_steps=1.5", "max_steps = '1.5': must be int"),
    ("batch_size=0", "at least 1"),
    ("objective=denoise", "one of georecon, coord, rec_only"),
    ("deterministic=yes", "must be bool"),
    ("pooling=max", "one of mean, sum, attention"),
    ("model.num_heads=5", "multiple"),
    ("seed=1e30", "seed = '1e30': must be int"),
    ("model.embedding_dimension=1", "at least 2"),
    ("model.max_z=1e12", "cannot be made"),
    ("out_dir=tiny.yaml", "cannot be used"),
    ("out_dir=/proc/nope", "cannot be made"),
    ("model.vec_norm_layer=layer", "one of none, rms, whiten"),
    ("model.num_layers=0", "at least 1"),
    ("model.cutoff_upper=0", "model.cutoff_upper"),
    ("model=5", "mapping"),
    ("keep_steps=a", "must be int"),
    ("resume", "key=value"),
    ("data=nowhere.h5", "nowhere.h5"),
    ("data=", "data is not set"),
    ("split=train_300K", "no such split"),
    ("val_size=5000", "val_size"),
    ("batch_size=5000", "batch_size"),
    ("accumulate=3", "batch_size"),
    ("model.max_z=6", "model.max_z"),
    ("model.max_num_neighbors=3", "max_num_neighbors"),
]


@pytest.mark.parametrize("setting, message", BAD_SETTINGS, ids=[setting for setting, _ in BAD_SETTINGS])
def test_a_bad_setting_is_one_line_and_leaves_no_folder(tiny, setting, message):
    with pytest.raises(InputError) as error:
        pretrain.main([str(tiny), setting])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not Path("out/tiny/last.pt").exists()


BAD_YAML = [
    ("lr: 1\nlr: 2\n", "given twice"),
    ("lr: [1\n", "not valid yaml"),
    ("- lr\n", "mapping"),
    ("", "mapping"),
    ("base: nowhere.yaml\n", "nowhere.yaml"),
    ("base: tiny.yaml\n", "cannot have a base itself"),
    ("model: 3\n", "mapping"),
    ("lr: null\n", "must be float"),
    ("lr: {a: 1}\n", "must be float"),
    ("\x00", "not valid yaml"),
]


@pytest.mark.parametrize("text, message", BAD_YAML)
def test_a_bad_yaml_is_one_line(tiny, text, message):
    tiny.write_text(text)
    with pytest.raises(InputError) as error:
        pretrain.main([str(tiny)])
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.code == 2


def test_exit_codes_and_no_traceback(tiny):
    for arguments, code in (([], 2), ([tiny, "data=nowhere.h5"], 1)):
        process = launch(*arguments)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert "Traceback" not in err and (not arguments or len(err.splitlines()) == 1)


def test_numbers_next_to_zero_are_zero_on_every_thread():
    # on an Intel core a product of one takes a hundred times as long: the step of the wide encoder 2.4 times
    products = "x = torch.full((1 << 20,), 1e-20, requires_grad=True); y = x * 1e-20; y.sum().backward()"
    told = "print(int(y.count_nonzero()), int((x.grad * 1e-20).count_nonzero()))"
    code = f"import torch, pretrain; torch.set_num_threads(2); pretrain.tune_cpu(); {products}; {told}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0 0\n"


def test_learning_rate():
    config = load_config(PretrainConfig, [str(ROOT / "configs/pcqm.yaml")])
    assert learning_rate(0, config) == pytest.approx(4e-4 / 10_000)
    assert learning_rate(9_999, config) == pytest.approx(4e-4)
    assert learning_rate(200_000, config) == pytest.approx((4e-4 + 1e-7) / 2)
    assert learning_rate(400_000, config) == pytest.approx(1e-7) == learning_rate(500_000, config)


# ---------------------------------------------------------------- the loop


def test_a_run_leaves_what_design_promises(tiny):
    pretrain.main([str(tiny), "keep_steps=10"])
    folder = Path("out/tiny")
    names = {"config.yaml", "log.jsonl", "last.pt", "encoder.pt", "metrics.json", "step_10.pt", ".lock"}
    assert {path.name for path in folder.iterdir()} == names
    assert [record["step"] for record in read_log(folder)] == list(range(1, 21))
    assert [record["step"] for record in read_log(folder, "val")] == [0, 10, 20]
    train, val = read_log(folder)[-1], read_log(folder, "val")[-1]
    losses = {"loss", "loss_noise", "loss_clean", "loss_rec"}
    assert losses | {"grad_norm", "lr", "molecules_per_s", "step", "split"} == set(train)
    assert losses | {"loss_rec_shuffled", "step", "split"} == set(val)
    assert train["loss"] == pytest.approx(
        train["loss_noise"] + train["loss_clean"] + 0.45 * train["loss_rec"], rel=1e-5
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["val"]["loss"] == val["loss"] and metrics["steps"] == 20 and metrics["seed"] == 1
    assert metrics["data_sha256"] == Molecules(DEMO).sha256() and set(metrics["units"]) == set(metrics["val"])
    encoder, saved = load_encoder(folder / "encoder.pt"), torch.load(folder / "last.pt", "cpu", weights_only=True)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, saved["state_dict"][f"encoder.{key}"])
    assert torch.load(folder / "step_10.pt", weights_only=True)["step"] == 10


@pytest.mark.parametrize("objective", ["coord", "rec_only"])
def test_other_objectives_run(tiny, objective):
    pretrain.main([str(tiny), f"objective={objective}", "max_steps=3", "alpha=1.2", "precision=bf16"])
    (last,) = read_log("out/tiny", "val")[-1:]
    assert ("loss_rec" in last) == (objective == "rec_only") and np.isfinite(last["loss"])


def test_it_learns(tiny):
    """Noise and rec terms fall on molecules that were not trained on; the clean term stays small."""
    pretrain.main([str(tiny), "max_steps=300", "lr=3e-3", "lr_cosine_length=300", "log_every=100", "val_every=300"])
    first, last = read_log("out/tiny", "val")
    assert last["loss_noise"] < 0.8 * first["loss_noise"] and last["loss_rec"] < 0.8 * first["loss_rec"]
    assert last["loss_clean"] < 0.1


def test_validation_noise_belongs_to_the_molecule():
    molecules, index = Molecules(DEMO), np.arange(50, 70)
    whole = validation_batches(molecules, index, 100)[0]["noise"]
    parts = validation_batches(molecules, index, 7)
    assert len(parts) == 3 and torch.equal(torch.cat([part["noise"] for part in parts]), whole)
    assert abs(whole.mean()) < 0.1 and abs(whole.std() - 1) < 0.1


def test_accumulation_and_workers_change_rounding_only(tiny):
    pretrain.main([str(tiny)])
    pretrain.main([str(tiny), "out_dir=out/parts", "accumulate=4", "num_workers=1"])
    for a, b in zip(read_log("out/tiny"), read_log("out/parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_two_ranks_equal_one(tiny):
    run(tiny, "out_dir=out/tiny", ranks=1)
    run(tiny, "out_dir=out/two", ranks=2)
    for split in ("train", "val"):
        for a, b in zip(read_log("out/tiny", split), read_log("out/two", split), strict=True):
            for name in a.keys() & {"loss", "loss_noise", "loss_clean", "loss_rec", "loss_rec_shuffled"}:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (split, a["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["alpha=1.3", "model.vec_norm_out=whiten"]], ids=str)
def test_compiled_equals_uncompiled(tiny, settings):
    """To rounding; and a compiled run that goes on ends with the bits of one that was not stopped."""
    pretrain.main([str(tiny), *settings])
    pretrain.main([str(tiny), *settings, "compile=true", "out_dir=out/compiled"])
    for a, b in zip(read_log("out/tiny"), read_log("out/compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    pretrain.main([str(tiny), *settings, "compile=true", "out_dir=out/again", "max_steps=9"])
    pretrain.main([str(tiny), *settings, "compile=true", "out_dir=out/again", "resume=true"])
    assert same_bits("out/compiled", "out/again")


@pytest.mark.parametrize("found", ["nothing", "one that fails", "another"])
def test_compiling_needs_a_compiler(tiny, tmp_path, monkeypatch, found):
    if found != "nothing":
        compiler = tmp_path / ("g++" if found == "one that fails" else "clang++")  # torch asks for g++ alone
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match="torch cannot compile here"):
        pretrain.main([str(tiny), "compile=true"])
    assert not Path("out/tiny").exists()


def test_the_first_weights_may_be_kept(tiny):
    pretrain.main([str(tiny), "keep_steps=0", "max_steps=1", "lr=0"])
    first, last = (torch.load(f"out/tiny/{name}.pt", weights_only=True) for name in ("step_0", "last"))
    assert first["step"] == 0 and all(torch.equal(v, last["state_dict"][k]) for k, v in first["state_dict"].items())


# ---------------------------------------------------------------- stopping and going on


def test_a_run_is_never_overwritten(tiny):
    pretrain.main([str(tiny)])
    before = {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
    for arguments, message in (
        ([str(tiny)], "already holds a run"),
        ([str(tiny), "resume=true"], "is finished, at step 20"),
        ([str(tiny), "resume=true", "max_steps=10"], "is finished, at step 20"),
        ([str(tiny), "resume=true", "max_steps=25", "lr=1e-2"], "its lr is 0.001, now 0.01"),
        ([str(tiny), "resume=true", "max_steps=25", "model.num_layers=1"], "its model.num_layers is 2, now 1"),
        ([str(tiny), "resume=true", "out_dir=out/tyny"], "nothing to resume"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain.main(arguments)
    assert {path: path.read_bytes() for path in Path("out/tiny").iterdir()} == before


def test_a_longer_run_goes_on_from_a_finished_one(tiny):
    pretrain.main([str(tiny)])
    pretrain.main([str(tiny), "resume=true", "max_steps=25"])
    assert [record["step"] for record in read_log("out/tiny")] == list(range(1, 26))


@pytest.mark.parametrize("name", ["encoder.pt", "log.jsonl", "config.yaml", "metrics.json"])
def test_what_is_left_of_a_run_is_not_overwritten(tiny, name):
    pretrain.main([str(tiny)])
    for path in Path("out/tiny").iterdir():
        if path.name != name:
            path.unlink()
    before = Path("out/tiny", name).read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        pretrain.main([str(tiny)])
    if name == "metrics.json":
        with pytest.raises(InputError, match="holds no last.pt to go on from"):
            pretrain.main([str(tiny), "resume=true"])
    assert Path("out/tiny", name).read_bytes() == before


def test_of_two_runs_started_at_once_one_is_refused(tiny):
    config = load_config(PretrainConfig, [str(tiny)])
    assert pretrain.open_run_folder(config) is None  # both look at the folder before either writes to it
    assert pretrain.open_run_folder(config) is None
    pretrain.claim_run_folder(config, None)
    with pytest.raises(InputError, match="another run is at work there"):
        pretrain.claim_run_folder(config, None)


def test_stopped_at_any_rename_and_resumed_leaves_the_same_files(tiny, monkeypatch):
    """Every file is whole and of one step, wherever between two files the run was stopped."""
    pretrain.main([str(tiny), "out_dir=out/whole", "keep_steps=7,20"])
    replace = os.replace
    for rename in range(3, 12):
        calls, stopped = [], f"out/stopped_{rename}"

        def stop(source, target, calls=calls, rename=rename):
            calls.append(target)
            if len(calls) == rename:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pretrain.os, "replace", stop)
            pretrain.main([str(tiny), "keep_steps=7,20", f"out_dir={stopped}"])
        pretrain.main([str(tiny), "keep_steps=7,20", f"out_dir={stopped}", "resume=true"])
        assert same_bits("out/whole", stopped), rename
        assert {path.name for path in Path(stopped).iterdir()} == {path.name for path in Path("out/whole").iterdir()}
        for name in ("encoder.pt", "step_7.pt", "step_20.pt"):
            ours, theirs = (torch.load(Path(run, name), "cpu", weights_only=True) for run in (stopped, "out/whole"))
            assert all(torch.equal(value, theirs["state_dict"][key]) for key, value in ours["state_dict"].items()), name


def test_a_full_disk_leaves_the_last_checkpoint(tiny, monkeypatch):
    save, calls = torch.save, []

    def fill(content, path):
        calls.append(path)
        if len(calls) > 3:
            Path(path).write_bytes(b"half")
            raise RuntimeError("inline_container.cc: unexpected pos")
        save(content, path)

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(InputError, match="cannot be written"):
        pretrain.main([str(tiny)])
    assert torch.load("out/tiny/last.pt", "cpu", weights_only=True)["step"] == 7
    assert not list(Path("out/tiny").glob(".*.tmp"))


def test_a_log_with_junk_in_it_can_be_resumed(tiny):
    pretrain.main([str(tiny)])
    with open("out/tiny/log.jsonl", "ab") as file:
        file.write(b'[1]\n5\n{"a": 1}\n{"step": null}\n\xff\n{"step": 3')
    pretrain.main([str(tiny), "resume=true", "max_steps=22"])
    assert [record["step"] for record in read_log("out/tiny")] == list(range(1, 23))


def test_a_setting_younger_than_the_run_does_not_forbid_resuming(tiny):
    pretrain.main([str(tiny)])
    checkpoint = torch.load("out/tiny/last.pt", weights_only=True)
    del checkpoint["config"]["pooling"]
    torch.save(checkpoint, "out/tiny/last.pt")
    pretrain.main([str(tiny), "resume=true", "max_steps=21"])


def test_one_molecule_has_no_other_graph_embedding(tiny):
    pretrain.main([str(tiny), "max_steps=1", "inference_batch_size=1", "val_size=3"])
    assert "loss_rec_shuffled" not in read_log("out/tiny", "val")[0]


def test_a_run_killed_before_its_metrics_writes_them_when_resumed(tiny):
    pretrain.main([str(tiny)])
    metrics = json.loads(Path("out/tiny/metrics.json").read_text())
    Path("out/tiny/metrics.json").unlink()
    pretrain.main([str(tiny), "resume=true"])
    assert json.loads(Path("out/tiny/metrics.json").read_text())["val"] == metrics["val"]


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "encoder"])
def test_a_damaged_checkpoint_is_refused(tiny, damage):
    pretrain.main([str(tiny)])
    last = Path("out/tiny/last.pt")
    if damage == "cut":
        last.write_bytes(last.read_bytes()[:-1000])
    elif damage == "text":
        last.write_text("weights")
    elif damage == "pickle":
        torch.save({"schema": "georecon/1", "optimizer": Path("/")}, last)  # a class: pickle would run its code
    else:
        last.write_bytes(Path("out/tiny/encoder.pt").read_bytes())
    with pytest.raises(InputError, match="last.pt") as error:
        pretrain.main([str(tiny), "resume=true", "max_steps=25"])
    assert "\n" not in str(error.value)


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    with pytest.raises(InputError, match="loss is (nan|inf)"):
        pretrain.main([str(tiny), "lr=1e30"])
    named = json.loads(Path("out/tiny/not_finite.json").read_text())
    ids = Molecules(DEMO).ids[pretrain.load_data(load_config(PretrainConfig, [str(tiny)]), 0, 1)[1].chosen(1)]
    assert named["step"] == 2 and named["molecules"] == ids.tolist()
    encoder = load_encoder("out/tiny/encoder.pt") if Path("out/tiny/encoder.pt").exists() else None
    assert encoder is None or all(p.isfinite().all() for p in encoder.parameters())

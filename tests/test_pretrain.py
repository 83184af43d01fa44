"""Stage 1: settings, the loop, resuming, ranks, bad input."""

import json
import os
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_run import DEMO, ROOT, read_log, run, same_bits

import pretrain
from data import Molecules
from finetune import FinetuneConfig
from harness import compiled
from harness.compiled import settle
from harness.errors import InputError
from harness.files import sha256
from harness.settings import load_config, read_yaml
from model import load_encoder
from pretrain import PretrainConfig, learning_rate, validation_batches

# ---------------------------------------------------------------- settings


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def stage_of(path):
    """The dataclass of a config: shared bases are not runs, all else with a target is of finetune.py."""
    if path.stem in ("qm9", "md17", "molnet"):
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
    assert metrics["data_sha256"] == sha256(DEMO) and set(metrics["units"]) == set(metrics["val"])
    encoder, saved = load_encoder(folder / "encoder.pt"), torch.load(folder / "last.pt", "cpu", weights_only=True)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, saved["state_dict"][f"encoder.{key}"])
    assert torch.load(folder / "step_10.pt", weights_only=True)["step"] == 10


@pytest.mark.parametrize("objective", ["coord", "rec_only"])
def test_other_objectives_run(tiny, objective):
    pretrain.main([str(tiny), f"objective={objective}", "max_steps=3", "alpha=1.2", "precision=bf16"])
    (last,) = read_log("out/tiny", "val")[-1:]
    assert ("loss_rec" in last) == (objective == "rec_only") and np.isfinite(last["loss"])


def test_tf32_is_a_gpus_and_only_where_it_is_asked_for(tiny):
    config, before = load_config(PretrainConfig, [str(tiny)]), torch.get_float32_matmul_precision()
    for precision, told in (("tf32", "high"), ("32", "highest")):
        pretrain.make_model(replace(config, precision=precision), torch.device("meta"))
        assert torch.get_float32_matmul_precision() == told
    with pytest.raises(InputError, match="this is a CPU: set 32 or bf16"):
        pretrain.make_model(replace(config, precision="tf32"), torch.device("cpu"))
    torch.set_float32_matmul_precision(before)


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
    config = load_config(PretrainConfig, [str(tiny), "max_steps=3000"])
    assert settle(config, torch.device("cpu"), None).compile is False
    with pytest.raises(InputError, match="torch cannot compile here"):
        pretrain.main([str(tiny), "compile=true"])
    assert not Path("out/tiny").exists()


def test_an_error_after_a_signal_is_one_line(tiny, monkeypatch):
    """Ctrl-C reaches a compiler in the same terminal, whose failure is not the user's."""

    def broken(*_):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("CppCompileError")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train_step", broken)
        with pytest.raises(InputError, match="stopped by SIGINT in step 1: resume=true goes on") as caught:
            pretrain.main([str(tiny)])
    assert caught.value.code == 130
    pretrain.main([str(tiny), "resume=true"])


@pytest.mark.parametrize("steps, works, expected", [(3000, True, True), (3000, False, False), (20, True, False)])
def test_a_long_run_compiles_where_there_is_a_compiler(tiny, monkeypatch, steps, works, expected):
    """The choice stands in config.yaml, and a resumed run keeps it."""

    def check(device):
        if not works:
            raise InputError("no compiler")
        return True

    monkeypatch.setattr(compiled, "check_compiler", check)
    seen, cpu, cuda = [], torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(pretrain, "compile_layers", lambda model, device: seen.append(model))
    for more in ([], ["compile=auto"]):
        config = load_config(PretrainConfig, [str(tiny), f"max_steps={steps}", "deterministic=false", *more])
        assert settle(config, cpu, None).compile is settle(config, cuda, None).compile is expected
        for before in (True, False):
            assert settle(config, cpu, {"config": {"compile": before}}).compile is before
        assert settle(config, cpu, {"config": {}}).compile is None  # of an older version
    assert settle(replace(config, compile=True), cpu, None).compile is True
    for unsure in (FinetuneConfig(target="energy_forces", max_steps=steps), replace(config, deterministic=True)):
        assert settle(unsure, cpu, None).compile is expected and settle(unsure, cuda, None).compile is False
    pretrain.main([str(tiny), "max_steps=2"])
    assert yaml.safe_load(Path("out/tiny/config.yaml").read_text())["compile"] is False and not seen


def test_the_compiler_of_this_machine_is_found(tiny):
    assert settle(load_config(PretrainConfig, [str(tiny), "max_steps=3000"]), torch.device("cpu"), None).compile is True


@pytest.mark.parametrize("signalled, said", [(False, "set compile=false, .*PassManager"), (True, "stopped by SIGINT")])
def test_what_torch_cannot_compile_is_one_line(tiny, monkeypatch, signalled, said):
    """After a signal the signal is what is said: Ctrl-C ends the compiler, too."""

    def broken(*_):
        if signalled:
            os.kill(os.getpid(), signal.SIGINT)
        raise torch._dynamo.exc.TorchDynamoException("PassManager::run failed")

    monkeypatch.setattr(pretrain, "train_step", broken)
    with pytest.raises(InputError, match=said):
        pretrain.main([str(tiny)])


def test_the_first_weights_may_be_kept(tiny):
    pretrain.main([str(tiny), "keep_steps=0", "max_steps=1", "lr=0"])
    first, last = (torch.load(f"out/tiny/{name}.pt", weights_only=True) for name in ("step_0", "last"))
    assert first["step"] == 0 and all(torch.equal(v, last["state_dict"][k]) for k, v in first["state_dict"].items())


# ---------------------------------------------------------------- stopping and going on


def test_one_molecule_has_no_other_graph_embedding(tiny):
    pretrain.main([str(tiny), "max_steps=1", "inference_batch_size=1", "val_size=3"])
    assert "loss_rec_shuffled" not in read_log("out/tiny", "val")[0]

"""harness/: settings, the command line, run folders, and going on where a run stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_run import DEMO, ROOT, TINY, launch, read_log, same_bits

import pretrain
from data import Molecules, StepBatches, split_indices
from harness import files
from harness.errors import InputError, cli
from harness.folder import claim_folder, open_folder
from harness.settings import load_config
from harness.weights import require
from model import load_encoder
from pretrain import PretrainConfig


def test_values_take_the_type_of_their_field(tiny):
    tiny.write_text("data: x.h5\nlr: 1e-4\nprecision: 32\nkeep_steps: [10, 20]\n")
    config = load_config(PretrainConfig, [str(tiny), "lr_min=1e-6", "max_steps=1e5", "deterministic=true"])
    assert (config.lr, config.lr_min, config.max_steps, config.precision) == (1e-4, 1e-6, 100_000, "32")
    assert config.keep_steps == (10, 20) and config.deterministic is True
    assert load_config(PretrainConfig, [str(tiny), "keep_steps=5,6"]).keep_steps == (5, 6)
    assert load_config(PretrainConfig, [str(tiny), "model.num_layers=3"]).model.num_layers == 3


BAD_YAML = [
    ("lr: 1\nlr: 2\n", "given twice"),
    ("lr: [1\n", "not valid yaml"),
    ("- lr\n", "mapping"),
    ("", "mapping"),
    ("base: nowhere.yaml\n", "nowhere.yaml"),
    ("base: tiny.yaml\n", "cannot have a base itself"),
    ("model: 3\n", "mapping"),
    ("lr: null\n", "must be float"),
    ("out_dir:\n", "must be str"),
    ("lr: {a: 1}\n", "must be float"),
    ("\x00", "not valid yaml"),
]


@pytest.mark.parametrize("text, message", BAD_YAML)
def test_a_bad_yaml_is_one_line(tiny, text, message):
    tiny.write_text(text)
    with pytest.raises(InputError) as error:
        pretrain.main([str(tiny)])
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.code == 2


def test_a_base_may_be_in_another_folder_or_quoted(tiny):
    Path("base.yaml").write_text("# data:    python data.py md17 a.npz nowhere.h5\nlr: 2\n")
    Path("mine").mkdir()
    for name in ("my base.yaml", "a #b.yaml", "it's.yaml"):
        Path("mine", name).write_text(Path("base.yaml").read_text())
    named = ("my base.yaml  # mine", '"a #b.yaml"', "'it''s.yaml'")
    for base in ("../base.yaml", str(Path("base.yaml").resolve()), '"../base.yaml"', *named):
        Path("mine/run.yaml").write_text(f"base: {base}\ndata: nowhere.h5\n")
        assert load_config(PretrainConfig, ["mine/run.yaml"]).lr == 2
        with pytest.raises(InputError, match=r"make it with `python data.py md17 a.npz nowhere.h5`"):
            pretrain.main(["mine/run.yaml"])


def test_the_rate_is_that_of_training(tiny, monkeypatch):
    """A step takes a second here. Validating and saving take a hundred, and are no part of it, wherever they fall."""
    clock = [0.0]

    def taking(seconds, function):
        def timed(*arguments):
            clock[0] += seconds
            return function(*arguments)

        return timed

    monkeypatch.setattr("harness.run.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for name, seconds in {"train_step": 1, "evaluate": 100, "save_encoder": 100}.items():
        monkeypatch.setattr(pretrain, name, taking(seconds, getattr(pretrain, name)))
    pretrain.main([str(tiny), "max_steps=12", "log_every=4", "val_every=3", "save_every=5"])
    assert [record["molecules_per_s"] for record in read_log("out/tiny")] == [8.0, 8.0, 8.0]


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
    code = f"import torch, harness.ranks; torch.set_num_threads(2); harness.ranks.tune_cpu(); {products}; {told}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0 0\n"


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    def write(path):
        path.write_text("half")
        raise AttributeError("of another program")

    with pytest.raises(AttributeError):
        files.write_whole(tmp_path / "out.txt", write)
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten(tiny):
    pretrain.main([str(tiny)])
    before = {path: path.read_bytes() for path in Path("out/tiny").iterdir()}
    for arguments, message in (
        ([str(tiny)], "already holds a run"),
        ([str(tiny), "resume=true"], "finished at step 20: set max_steps"),
        ([str(tiny), "resume=true", "max_steps=10"], "finished at step 20: set max_steps"),
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


def test_what_resuming_may_change(tiny):
    pretrain.main([str(tiny), "max_steps=5", "lr_cosine_length=20"])
    more = [str(tiny), "resume=true", "max_steps=20"]
    with pytest.raises(InputError, match="its batch_size is"):
        pretrain.main([*more, "batch_size=4"])
    pretrain.main([*more, "val_every=3", "save_every=3", "log_every=2", "keep_steps=18", "inference_batch_size=7"])
    assert Path("out/tiny/step_18.pt").exists()


def test_a_run_that_was_stopped_does_not_end_at_an_earlier_step(tiny):
    """Its figures, or its encoder.pt, would be those of another step."""
    pretrain.main([str(tiny), "max_steps=8"])
    content = torch.load("out/tiny/last.pt", weights_only=True)
    content["config"]["max_steps"] = 20  # what a signal after step 8 leaves
    torch.save(content, "out/tiny/last.pt")
    Path("out/tiny/metrics.json").unlink()
    with pytest.raises(InputError, match="stopped at step 8: set max_steps"):
        pretrain.main([str(tiny), "max_steps=8", "resume=true"])
    pretrain.main([str(tiny), "max_steps=20", "resume=true"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_debugger_sees_the_locals_of_an_error_unless_they_hold_loaders(tiny, monkeypatch, num_workers):
    def fail(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(pretrain, "train_step", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        pretrain.main([str(tiny), f"num_workers={num_workers}"])
    (frame,) = [entry.frame for entry in caught.traceback if entry.name == "pretrain"]
    assert ("batches" in frame.f_locals) == (num_workers == 0)


def test_only_a_runs_own_unfinished_files_are_removed(tiny):
    Path("out/tiny").mkdir(parents=True)
    for name in (".last.pt.tmp", ".step_7.pt.tmp", ".of_another_program.tmp"):
        Path("out/tiny", name).write_text("x")
    claim_folder(load_config(PretrainConfig, [str(tiny)]), None)
    assert [path.name for path in Path("out/tiny").glob(".*.tmp")] == [".of_another_program.tmp"]


def test_of_two_runs_started_at_once_one_is_refused(tiny):
    config = load_config(PretrainConfig, [str(tiny)])
    assert open_folder(config) is None  # both look at the folder before either writes to it
    assert open_folder(config) is None
    claim_folder(config, None)
    with pytest.raises(InputError, match="another run is at work there"):
        claim_folder(config, None)


def test_a_step_below_zero_is_refused(tiny):
    pretrain.main([str(tiny), "max_steps=2", "out_dir=out/whole"])
    content = torch.load("out/whole/last.pt", weights_only=True)
    torch.save(content | {"step": -1}, "out/whole/last.pt")
    with pytest.raises(InputError, match="last.pt: its step is -1"):
        pretrain.main([str(tiny), "out_dir=out/whole", "resume=true"])


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
            patch.setattr(files.os, "replace", stop)
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
    molecules = Molecules(DEMO)
    train = split_indices(len(molecules), [TINY["val_size"], None])[1]
    ids = molecules.ids[StepBatches(molecules, train, TINY["batch_size"], seed=1).chosen(1)]
    assert named["step"] == 2 and named["molecules"] == ids.tolist()
    encoder = load_encoder("out/tiny/encoder.pt") if Path("out/tiny/encoder.pt").exists() else None
    assert encoder is None or all(p.isfinite().all() for p in encoder.parameters())


def test_usage_is_printed_where_it_is_asked_for_and_where_arguments_are_missing(monkeypatch, capsys):
    def main(arguments):
        print(arguments)

    for words, code, out, err in [
        (["-h"], 0, "how\n", ""),
        (["--help", "a", "b"], 0, "how\n", ""),
        ([], 2, "", "how\n"),
        (["a"], 2, "", "how\n"),
        (["a", "b"], 0, "['a', 'b']\n", ""),
    ]:
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        try:
            cli(main, "\nhow\n", needed=2)
            left = 0
        except SystemExit as exit_:
            left = exit_.code
        said = capsys.readouterr()
        assert (left, said.out, said.err) == (code, out, err)


def test_a_missing_data_file_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ROOT / "configs"
    for config, command in (
        ("qm9_small", "python data.py qm9 qm9pack-1.0.3-py3-none-any.whl data/qm9.h5`"),
        ("pcqm_coord", "python data.py pcqm4mv2 pcqm4m-v2-train.sdf.tar.gz data/pcqm4mv2.h5`"),  # of its base
        ("3bpa_pretrain", "test_1200K.xyz data/3bpa.h5`"),
    ):
        with pytest.raises(InputError, match="no such file: make it with `") as error:
            pretrain.main([str(configs / f"{config}.yaml")])
        assert str(error.value).endswith(command)
    with pytest.raises(InputError, match="other.h5: no such file: convert one with"):
        pretrain.main([str(configs / "qm9_small.yaml"), "data=other.h5"])


def templates():
    weight = torch.zeros(2, 3)
    good = {"a": 1, "b": {"x": 0.5, "y": 1.5}, "c": weight, "d": "text", "e": None}
    like = {"a": int, "b": {str: float}, "c": torch.empty(2, 3, device="meta"), "d": "text", "e": (str, type(None))}
    yield good, like, None
    for change, words in (
        ({"a": True}, "its a is True, expected int"),
        ({"a": 1.0}, "its a is 1.0, expected int"),
        ({"b": {"x": float("nan")}}, "its b: its x is nan, expected float"),
        ({"b": {3: 0.5}}, "its b: a key is 3, expected str"),
        ({"b": []}, "its b is [], expected dict"),
        ({"c": weight.double()}, "its c is no torch.float32 (2, 3)"),
        ({"c": weight.T}, "its c is no torch.float32 (2, 3)"),
        ({"c": weight[:1]}, "its c is no torch.float32 (2, 3)"),
        ({"c": torch.zeros(1).expand(2, 3)}, "its c is no plain tensor"),
        ({"c": weight + torch.inf}, "its c is not finite"),
        ({"d": "other"}, "its d is 'other', expected 'text'"),
        ({"e": 5}, "its e is 5, expected str or NoneType"),
    ):
        yield good | change, like, words
    yield {key: value for key, value in good.items() if key != "d"}, like, "its d is missing"


@pytest.mark.parametrize(("found", "like", "words"), list(templates()))
def test_a_template_refuses_what_does_not_look_like_it(found, like, words):
    if words is None:
        return require(found, like, "file.pt")
    with pytest.raises(InputError) as error:
        require(found, like, "file.pt")
    assert str(error.value).startswith("file.pt: ") and words in str(error.value)

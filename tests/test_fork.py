"""What README.md says of forking: the loop of pretraining without its harness."""

from dataclasses import replace
from pathlib import Path

import fork_loop
import torch

import pretrain


def test_the_loop_without_its_harness_trains_the_same_weights(tmp_path, monkeypatch):
    """Sixty lines, and the bits of `pretrain.py configs/demo.yaml`."""
    assert len(Path(fork_loop.__file__).read_text().splitlines()) <= 60
    monkeypatch.chdir(Path(__file__).parent.parent)
    plain = fork_loop.pretrain(replace(fork_loop.CONFIG, max_steps=5))
    pretrain.main(["configs/demo.yaml", "max_steps=5", "val_every=5", f"out_dir={tmp_path / 'run'}"])
    ours = torch.load(tmp_path / "run/last.pt", weights_only=True)["state_dict"]
    assert plain.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())

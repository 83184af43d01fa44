"""A run: started or resumed, stepped, logged, saved and finished. A stage calls it; it calls nothing of a stage."""

import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from traceback import clear_frames

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from harness.compiled import settle
from harness.errors import InputError, explain, one_line
from harness.files import provenance, sha256, write_json
from harness.folder import LAST, REMEDY, RUN_FILES, Log, check_same_run, claim_folder, open_folder
from harness.ranks import SIGNALS, barrier, follow_parent, join_ranks, sum_over_ranks, tune_cpu
from harness.settings import check_data, load_config
from harness.weights import load_adam, require, require_finite, save_torch

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows: the memory is not known
    getrusage = None


def start(stage, kind, arguments):
    """Run stage(config, run) from its command line, whose settings are the dataclass kind."""
    config = load_config(kind, arguments)
    check_data(arguments[0], config.data)
    tune_cpu()
    with Run(config) as run:
        stage(settle(config, run.device, run.checkpoint), run)


class Run:
    """One run in one folder, on this rank. A stage calls parallel, restore and begin; then, in the loop over steps,
    record and, where `validating` and `saving` say so, log.write and save; at last finish.
    """

    def __init__(self, config):
        self.device, self.rank, self.world = join_ranks(config.deterministic)
        self.config, self.folder = config, Path(config.out_dir)
        self.checkpoint = open_folder(config)
        self.is_new = self.checkpoint is None
        self.made_by = provenance(self.device, self.world)  # now: the checkout may move on during a long run
        self.step, self.lock, self.handlers, self.caught = 0, None, {}, []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.release_signals()
        clear_frames(traceback if self.config.num_workers else None)  # they hold the loader's
        if self.lock:
            self.lock.close()
        if kind is None and dist.is_initialized():
            # gloo's threads must let go of the last tensors before the interpreter ends, or it aborts now and then
            # (pytorch #179291). A DDP module would keep the group alive: the stage's is gone by now
            dist.barrier()
            dist.destroy_process_group()
        if self.caught and kind and not issubclass(kind, InputError | SystemExit):  # Ctrl-C ends a compiler, too
            said = f"stopped by {signal.Signals(self.caught[0]).name} in step {self.step + 1}: resume=true goes on"
            raise InputError(said, code=128 + self.caught[0]) from None
        if kind and kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise InputError(f"set compile=false, torch cannot compile: {one_line(error)}") from error

    def parallel(self, model, **options):
        if dist.is_initialized():
            model = DistributedDataParallel(model, gradient_as_bucket_view=True, **options)
            model.broadcast_buffers = False  # none changes in training; as an argument it warns
        return model

    def restore(self, config, source, state, like, **parts):
        """Load last.pt, if there is one, into parts (modules, the optimizer) and state (a dict of plain values).

        save() writes the same parts and state later. source is the StepBatches to train on. like is the template
        that state must fit in last.pt. A part may be None. restore writes nothing, so a stage may still refuse.
        """
        self.config, self.source, self.state = config, source, state
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.data_sha256, self.wall_s = sha256(source.molecules.path), 0.0
        if self.is_new:
            return
        last, found = self.folder / "last.pt", self.checkpoint
        check_same_run(found, config, self.data_sha256)
        require(found, dict.fromkeys(self.parts, dict) | like, last)
        self.step, self.wall_s = found["step"], found["wall_s"]
        with explain(f"{last} does not fit this code's model"):
            for name, part in self.parts.items():
                if isinstance(part, torch.optim.Optimizer):
                    load_adam(part, found[name], self.step)
                else:
                    part.load_state_dict(found[name])
        state.update({name: found[name] for name in state})

    def begin(self, *lines):
        """Claim the folder and open the log, whose first lines these are."""
        config = self.config
        barrier()  # every rank has looked at the folder before rank 0 writes to it
        if self.rank == 0:
            self.lock = claim_folder(config, None if self.is_new else self.step)
        self.log = Log(self.folder / "log.jsonl", self.step, config.max_steps, self.rank == 0)
        self.say = self.log.say
        self.say("\n".join(lines))
        name = self.made_by["device"] if self.device.type == "cuda" else f"{self.made_by['threads']} CPU threads"
        ranks = f"{self.world} x {name}{', compiled in the first step' * bool(config.compile)}"
        self.say(f"{ranks}; {config.max_steps:,} steps of {config.batch_size} molecules")
        if not self.is_new:
            self.say(f"resumed {self.folder} at step {self.step}")
        self.began = time.perf_counter() - self.wall_s

    def steps(self):
        """(step, this rank's parts of the batch), from the step that last.pt holds to max_steps, or to a signal."""
        steps = range(self.step, self.config.max_steps)
        options = {"num_workers": self.config.num_workers, "worker_init_fn": follow_parent}
        options["pin_memory"] = self.device.type == "cuda"
        loader = DataLoader(self.source, batch_size=None, sampler=steps, **options)
        self.window, self.window_began = [], time.perf_counter()
        self.catch_signals()
        for step, parts in enumerate(loader, self.step):
            yield step, parts
            if self.stop and self.step < self.config.max_steps:
                self.end_early()
            self.window_began += time.perf_counter() - self.recorded  # neither validating nor saving is training
        self.release_signals()

    def record(self, losses, lr):
        """Count a step; set validating, saving and stop. losses: this rank's shares by name, logged as means."""
        self.step += 1
        config, step = self.config, self.step
        self.window.append(torch.stack(list(losses.values())))
        self.log.bar.update()
        self.stop = self.asked_to_stop()
        last = step == config.max_steps
        self.validating = last or step % config.val_every == 0
        self.saving = last or self.stop or step % config.save_every == 0 or step in config.keep_steps
        logging = last or step % config.log_every == 0
        if logging or self.saving:
            means = self.finite_means(list(losses))
        if logging:
            elapsed = max(time.perf_counter() - self.window_began, 1e-9)
            rate = round(len(self.window) * config.batch_size / elapsed, 1)
            self.log.write({"step": step, "split": "train", **means, "lr": lr, "molecules_per_s": rate})
            self.window, self.window_began = [], time.perf_counter()
        self.recorded = time.perf_counter()

    def finite_means(self, names):
        """Mean losses by name since the last logged step. If one is not finite, stop and name its step."""
        values = sum_over_ranks(torch.stack(self.window))  # (steps, names)
        bad = ~values.isfinite().all(1)
        if not bad.any():
            return dict(zip(names, values.mean(0).tolist(), strict=True))
        row = int(bad.nonzero()[0])
        step, found = self.step - len(values) + row, dict(zip(names, map(str, values[row].tolist()), strict=True))
        path, last = self.folder / "not_finite.json", self.folder / "last.pt"
        if self.rank == 0:
            ids = self.source.molecules.ids[self.source.chosen(step)].tolist()
            write_json(path, {"step": step + 1, "losses": found, "molecules": ids})
        good = f"{last} is from before" if last.exists() else "there is no checkpoint yet"
        barrier()  # torchrun ends the other ranks as soon as one is gone
        said = f"the loss is {found['loss']}, its gradient {found['grad_norm']} at step {step + 1}"
        raise InputError(f"{said}; {path} names that step's molecules; {good}: {REMEDY}")

    def catch_signals(self):
        """SIGTERM, SIGINT, SIGHUP, unless ignored, let the step end in order; a second one kills.

        Under torchrun a second one does not kill: torchrun forwards signals that the ranks may already have.
        """
        self.handlers = {n: h for n in SIGNALS if (h := signal.getsignal(n)) != signal.SIG_IGN}
        for n in self.handlers:
            signal.signal(n, self.note_signal)

    def note_signal(self, number, frame):
        self.caught.append(number)
        if len(self.caught) > 1 and not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def release_signals(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def asked_to_stop(self):
        """Number of the signal that some rank has caught, else 0. Ranks agree on it each step: torchrun waits 30 s."""
        number = self.caught[0] if self.caught else 0
        if self.world == 1:
            return number
        seen = torch.tensor(number)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return int(seen)

    def end_early(self):
        self.log.bar.close()
        barrier()  # torchrun ends the other ranks as soon as one is gone
        if self.rank:
            raise SystemExit(128 + self.stop)
        said = f"stopped by {signal.Signals(self.stop).name} after step {self.step}, which {self.folder}/last.pt holds"
        raise InputError(f"{said}: resume=true goes on", code=128 + self.stop)

    def write(self, name, content):
        """A torch file of this run, by rank 0."""
        if self.rank == 0:
            save_torch(self.folder / name, content)

    def save(self, **others):
        """Write others (<name>.pt: content), a copy step_<n>.pt if it is to be kept, and last.pt.

        last.pt comes last: killed in between, the run goes on from the step before and writes the others again.
        """
        if self.rank:
            return
        require_finite(self.parts["state_dict"].state_dict(), f"step {self.step}")
        content = {"schema": LAST["schema"], "config": asdict(self.config), "data_sha256": self.data_sha256}
        content |= {"step": self.step, "wall_s": time.perf_counter() - self.began, **self.state}
        content |= {name: part.state_dict() for name, part in self.parts.items()}
        kept = {f"step_{self.step}": content} if self.step in self.config.keep_steps else {}
        for name, other in (others | kept | {"last": content}).items():
            self.write(f"{name}.pt", other)

    def finish(self, **figures):
        """metrics.json: the stage's figures, and what made them."""
        self.log.bar.close()
        if self.rank:
            return
        config, wall_s = self.config, time.perf_counter() - self.began
        resident = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) if getrusage else 0
        held = (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident) / 1e9 or None
        figures |= {"seed": config.seed, "steps": config.max_steps, "wall_s": round(wall_s, 1), "memory_gb": held}
        figures |= {"data": config.data, "data_sha256": self.data_sha256, **self.made_by}
        write_json(self.folder / "metrics.json", figures)
        written = ", ".join(name for name in RUN_FILES if (self.folder / name).exists())
        self.say(f"{wall_s:.0f} s{f', {held:.1f} GB at most' if held else ''}; wrote {written} to {self.folder}")

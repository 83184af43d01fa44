"""pretrain.py without its harness: no settings file, no log, no ranks, no resuming. Fork this if that is all you want.

python tests/fork_loop.py                from the repository's root; writes encoder.pt
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the five files, from wherever they are

from data import Molecules, StepBatches, split_indices
from model import ModelConfig, save_encoder
from pretrain import PretrainConfig, evaluate, learning_rate, make_model, train_step, validation_batches

CONFIG = PretrainConfig(
    data="data/qm9_demo.h5",
    val_size=200,
    batch_size=16,
    max_steps=500,
    lr=1e-3,
    lr_warmup_steps=50,
    lr_cosine_length=500,
    model=ModelConfig(embedding_dimension=32, num_layers=3, num_rbf=32, num_heads=4),
)


def pretrain(config):
    """Data, model, loop -> the trained model, with its encoder, head and decoder."""
    molecules = Molecules(config.data)
    val, train = split_indices(len(molecules), [config.val_size, None])
    batches = StepBatches(molecules, train, config.batch_size, config.seed)
    val_batches = validation_batches(molecules, val, config.inference_batch_size)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    for step in range(config.max_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        losses = train_step(model, batches[step], step, config, device, world=1)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    for name, value in evaluate(model, val_batches, config, device, rank=0, world=1).items():
        print(f"validation {name} {value:.4f}")
    return model


if __name__ == "__main__":
    torch.save(save_encoder(pretrain(CONFIG).encoder), "encoder.pt")

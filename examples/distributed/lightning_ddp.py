"""Lightning with the DDP strategy, trained to the size of the file.

python examples/distributed/lightning_ddp.py digits.thin 2
"""

import sys

import lightning.pytorch as pl
import torch
from data import RULES, digits, network
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import deepthin.torch as dt

EPOCHS, BATCH = 8, 32


class Digits(pl.LightningModule):
    """A thin network and its training."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """The loss of a batch."""
        x, y = batch
        return cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Codes have rates of their own."""
        return torch.optim.Adam(dt.parameter_groups(self.model, lr=1e-3))


def main(out: str, processes: int) -> None:
    """Train, save and judge."""
    torch.set_num_threads(1)
    model = network()
    dt.compress(model, RULES, init="scratch", seed=0)
    images, labels, test_images, test_labels = digits()
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True, drop_last=True)
    target = dt.SizeTarget(model, steps=EPOCHS * (len(loader) // processes))
    trainer = pl.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=EPOCHS,
        callbacks=[target.lightning_callback()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Digits(model), loader)
    if trainer.is_global_zero:
        size = dt.save(model, out)
        with torch.no_grad():
            wrong = (model.eval()(test_images).argmax(1) != test_labels).float().mean().item()
        print(f"{size} bytes, {100 * wrong:.1f} % errors")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

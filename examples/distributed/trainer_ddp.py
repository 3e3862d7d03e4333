"""The Trainer of Hugging Face, trained to the size of the file.

torchrun --nproc-per-node 2 examples/distributed/trainer_ddp.py digits.thin
"""

import os
import sys
import tempfile

import torch
from data import RULES, digits, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import deepthin.torch as dt

EPOCHS, BATCH = 8, 32


class Items(Dataset):
    """Images and labels by the names of the model's arguments."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"images": self.images[place], "labels": self.labels[place]}


class Classifier(nn.Module):
    """A network that returns its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and the scores of a batch."""
        scores = self.network(images)
        return {"loss": cross_entropy(scores, labels), "logits": scores}


torch.set_num_threads(1)
model = Classifier()
dt.compress(model, RULES, init="scratch", seed=0)
images, labels, test_images, test_labels = digits()
processes = int(os.environ.get("WORLD_SIZE", "1"))
steps = EPOCHS * -(-len(images) // (BATCH * processes))
target = dt.SizeTarget(model, steps=steps)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=BATCH, max_steps=steps, use_cpu=True, save_strategy="no",
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.Adam(dt.parameter_groups(model, lr=1e-3))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(model, arguments, train_dataset=Items(images, labels), optimizers=(optimizer, schedule),
                      callbacks=[target.trainer_callback()])  # fmt: skip
    trainer.train()
if trainer.is_world_process_zero():
    size = dt.save(model, sys.argv[1])
    with torch.no_grad():
        wrong = (model.network.eval()(test_images).argmax(1) != test_labels).float().mean().item()
    print(f"{size} bytes, {100 * wrong:.1f} % errors")
torch.distributed.destroy_process_group()

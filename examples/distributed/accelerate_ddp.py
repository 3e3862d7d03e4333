"""Accelerate (Hugging Face), trained to the size of the file.

accelerate launch --num_processes 2 --cpu examples/distributed/accelerate_ddp.py digits.thin
torchrun --nproc-per-node 2 examples/distributed/accelerate_ddp.py digits.thin
"""

import sys

import torch
from accelerate import Accelerator
from data import RULES, digits, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import deepthin.torch as dt

EPOCHS, BATCH = 8, 32

accelerator = Accelerator(cpu=True)
torch.set_num_threads(1)
model = network()
dt.compress(model, RULES, init="scratch", seed=0)  # before prepare
optimizer = torch.optim.Adam(dt.parameter_groups(model, lr=1e-3))
images, labels, test_images, test_labels = digits()
loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True, drop_last=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
target = dt.SizeTarget(model, steps=EPOCHS * len(loader))

for _ in range(EPOCHS):
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(x), y) + target.penalty())
        optimizer.step()
        target.step()

if accelerator.is_main_process:
    size = dt.save(accelerator.unwrap_model(model), sys.argv[1])
    with torch.no_grad():
        wrong = (model.eval()(test_images).argmax(1) != test_labels).float().mean().item()
    print(f"{size} bytes, {100 * wrong:.1f} % errors")
accelerator.end_training()

"""DistributedDataParallel, trained to the size of the file.

torchrun --nproc-per-node 2 examples/distributed/ddp.py digits.thin
"""

import sys

import torch
import torch.distributed as dist
from data import RULES, digits, network
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import deepthin.torch as dt

STEPS, BATCH = 200, 64

dist.init_process_group("gloo")  # "nccl" with GPUs
rank, processes = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)

model = network()
dt.compress(model, RULES, init="scratch", seed=0)  # before it is wrapped
ddp = DistributedDataParallel(model)
optimizer = torch.optim.Adam(dt.parameter_groups(model, lr=1e-3))
target = dt.SizeTarget(model, steps=STEPS)  # the same weight of a bit in all processes

images, labels, test_images, test_labels = digits()
order = torch.Generator().manual_seed(rank)  # each process draws batches of its own
for _ in range(STEPS):
    chosen = torch.randint(len(images), (BATCH // processes,), generator=order)
    loss = cross_entropy(ddp(images[chosen]), labels[chosen]) + target.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    target.step()

if rank == 0:  # all processes have the same network
    size = dt.save(ddp, sys.argv[1])
    with torch.no_grad():
        wrong = (model.eval()(test_images).argmax(1) != test_labels).float().mean().item()
    print(f"{size} bytes, {100 * wrong:.1f} % errors")
dist.destroy_process_group()

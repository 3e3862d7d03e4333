"""FSDP2 (fully_shard) with a checkpoint that goes on with another number of processes, trained to the size of the file.

torchrun --nproc-per-node 2 examples/distributed/fsdp.py digits.thin checkpoint --stop 100
torchrun --nproc-per-node 1 examples/distributed/fsdp.py digits.thin checkpoint
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from data import RULES, digits, network
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import deepthin.torch as dt

STEPS, BATCH = 200, 64

parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("checkpoint")
parser.add_argument("--stop", type=int, default=STEPS)
given = parser.parse_args()

dist.init_process_group("gloo")  # "nccl" with GPUs
rank, processes = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)

model = network()
dt.compress(model, RULES, init="scratch", seed=0)  # before it is sharded
for layer in (model[0], model[2], model[4]):
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.Adam(dt.parameter_groups(model, lr=1e-3))
target = dt.SizeTarget(model, steps=STEPS)

first = 0
if Path(given.checkpoint).exists():
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "target": target.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=given.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    target.load_state_dict(state["target"])
    first = state["step"]

images, labels, test_images, test_labels = digits()
for step in range(first, given.stop):
    # the batch of a step is the same for any number of processes: each takes its part
    chosen = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(step))[rank::processes]
    loss = cross_entropy(model(images[chosen]), labels[chosen])
    optimizer.zero_grad()
    loss.backward()
    target.add_gradient()
    optimizer.step()
    target.step()

if given.stop < STEPS:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "target": target.state_dict(), "step": given.stop}
    dcp.save(state, checkpoint_id=given.checkpoint)
else:
    size = dt.save(model, given.out)  # all processes call: each gathers, the first one writes
    if rank == 0:
        loaded = dt.load(network(), given.out).eval()
        with torch.no_grad():
            wrong = (loaded(test_images).argmax(1) != test_labels).float().mean().item()
        print(f"{size} bytes, {100 * wrong:.1f} % errors")
dist.destroy_process_group()

"""Distribution: blocks are units of FSDP2, and two processes train as one does."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphclone
from graphclone.pytorch import to_torch

Batch = list[torch.Tensor]


def train(module: torch.nn.Module, batches: list[Batch]) -> list[float]:
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.1), []
    for batch in batches:
        loss = module(*batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def sharded(module: torch.nn.Module) -> torch.nn.Module:
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in module.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def process(rank: int, path: str, batches: list[Batch], port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model, own = graphclone.load(path), [[tensor.chunk(2)[rank] for tensor in batch] for batch in batches]
    losses = torch.tensor([train(wrap(to_torch(model)), own) for wrap in (DistributedDataParallel, sharded)])
    dist.all_reduce(losses)
    if rank == 0:
        results.put((losses / 2).tolist())
    dist.destroy_process_group()


def test_two_processes_train_as_one():
    import zoo  # not in the processes, which would load transformers with it

    path = str(zoo.export("gpt2", "dynamo18"))
    batches = [[torch.from_numpy(each) for each in zoo.feeds("gpt2", 4, 7, seed=step).values()] for step in range(3)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(process, (path, batches, port, results), nprocs=2)
    want = train(to_torch(graphclone.load(path)), batches)
    assert torch.allclose(torch.tensor(results.get()), torch.tensor([want, want]), rtol=1e-5)

"""Trains a tiny model for some steps from a distributed checkpoint, and writes one, with any number of processes.

Started by torchrun with the optimizer's name, a folder, the first step and the last. Two processes share the model out
by `fully_shard`; one has it whole. Prints the losses as a line of JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.worker import LEARNING_RATE, batches, leave, make_model, targets
from uni_x.train.optimizers import MuonWithAdamW


def main(optimizer_name: str, folder: Path, first: int, last: int) -> None:
    dist.init_process_group("gloo")
    rank, processes = int(os.environ["RANK"]), dist.get_world_size()
    model = make_model()
    if processes > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model.lm_head)
        fully_shard(model)
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
    if optimizer_name == "muon":
        optimizer: torch.optim.Optimizer = MuonWithAdamW(model, muon_lr=10 * LEARNING_RATE, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    if first:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses = []
    for step in batches()[first:last]:
        own = step[rank::processes]
        items = sum(map(targets, step))
        loss = sum(model(**batch, num_items_in_batch=items).loss for batch in own)
        (loss * processes).backward()  # gradients are averaged over the processes
        optimizer.step()
        optimizer.zero_grad()
        share = loss.detach()
        dist.all_reduce(share)
        losses.append(share.item())
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / str(last))
    if rank == 0:
        print(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

"""One of two processes that train a tiny model under an engine, and compare each loss with one process alone.

Started by torchrun with the engine's name. Rank 0 mostly has a picture; rank 1 has text alone in the first step,
nothing to learn in the second, and pictures alone in the third; four such steps are repeated. Prints `ok` where all
losses agree.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from uni_x.model import UniXConfig, UniXForCausalLM

TEXT, CODES, MARKER = 40, 24, 30
LEARNING_RATE, STEPS = 1e-4, 10
TOLERANCE = 1e-5


def make_model() -> UniXForCausalLM:
    torch.manual_seed(0)
    config = UniXConfig(
        vocab_size=TEXT + CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        preset="uni-x",
        preset_arguments={"first": 1, "last": 1},
        image_token_offset=TEXT,
        image_codebook_size=CODES,
        vision_start_token_id=MARKER,
    )
    return UniXForCausalLM(config)


def batches() -> list[list[dict[str, torch.Tensor]]]:
    """Of each step the batch of each rank."""
    text = torch.arange(1, 15)[None] % MARKER
    image = torch.cat((torch.tensor([[3, 4, MARKER]]), TEXT + torch.arange(11)[None]), dim=1)
    codes = TEXT + torch.arange(14).flip(0)[None]
    nothing = torch.full_like(text, -100)
    half = image.clone()
    half[:, :9] = -100
    steps = [
        [{"input_ids": image, "labels": image}, {"input_ids": text, "labels": text}],
        [{"input_ids": image, "labels": half}, {"input_ids": text, "labels": nothing}],
        [{"input_ids": image, "labels": half}, {"input_ids": codes, "labels": codes}],
        [{"input_ids": text, "labels": text}, {"input_ids": codes, "labels": codes}],
    ]
    return (steps * STEPS)[:STEPS]


def targets(batch: dict[str, torch.Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def losses_of_one_process() -> list[float]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in batches():
        together = {name: torch.cat([batch[name] for batch in step]) for name in step[0]}
        loss = model(**together).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_under_fully_shard(rank: int) -> list[float]:
    model = make_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.lm_head)
    fully_shard(model)
    assert all(isinstance(weight, DTensor) for weight in model.parameters()), "a parameter is not sharded"
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in batches():
        items = sum(map(targets, step))
        loss = model(**step[rank], num_items_in_batch=items).loss
        (loss * dist.get_world_size()).backward()  # gradients are averaged over the ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def losses_under_zero(rank: int, stage: int) -> list[float]:
    import deepspeed

    model = make_model()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # its default is 1
        },
    )
    if stage == 3:
        assert all(weight.ds_tensor.numel() < weight.ds_numel for weight in engine.module.parameters())
    losses = []
    for step in batches():
        items = sum(map(targets, step))
        loss = engine(**step[rank], num_items_in_batch=items).loss
        engine.backward(loss * dist.get_world_size())
        engine.step()
        losses.append(loss.item())
    return losses


def main(engine: str) -> None:
    expected = losses_of_one_process()  # before the processes are joined
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    else:
        dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    losses = losses_under_fully_shard(rank) if engine == "fsdp" else losses_under_zero(rank, int(engine[-1]))
    shares = torch.tensor(losses)
    dist.all_reduce(shares)
    torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=TOLERANCE)
    dist.barrier()
    if rank == 0:
        print("ok")
    leave()


def leave() -> None:
    """Ends this process at once: a thread of gloo that outlives the interpreter's end now and then aborts it.

    See https://github.com/pytorch/pytorch/issues/190489.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

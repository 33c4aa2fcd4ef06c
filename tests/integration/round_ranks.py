"""A rank of the test of sample rounds: `python round_ranks.py RUN`, with RANK and WORLD_SIZE set.

With each kind of sharding: a round of three prompts, after which the weights must be those before it, and a round that
is asked to stop on one rank only.
"""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import nn

from opensora.acceleration.mesh import World, init_world
from opensora.acceleration.sharding import free_gathered_weights, local_shard, shard_model
from opensora.config.train import ParallelConfig, SamplesConfig
from opensora.models.stdit.stdit3 import STDiT3
from opensora.models.text_encoder.hash import HashTextEncoder
from opensora.models.vae.codec import VideoCodec
from opensora.sampling.rounds import RoundSampler
from opensora.schedulers.rf import RFLOW
from opensora.storage import Storage


def make_rounds(world: World, run: Storage, sharding: Literal["zero2", "zero3"]) -> None:
    torch.manual_seed(0)
    model = STDiT3(hidden_size=32, depth=2, num_heads=2, in_channels=16, caption_channels=16, model_max_length=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    shard_model(model, model.blocks, world=world, sharding=sharding, compute_dtype=torch.float32)
    before = [local_shard(parameter).clone() for parameter in model.parameters()]
    sampler = RoundSampler(
        SamplesConfig(every_steps=1, prompts=("a cat", "a dog runs", "a bird"), num_frames=5, image_size=(16, 24)),
        run=run,
        ranks=world,
        vae=VideoCodec(),
        text_encoder=HashTextEncoder(output_dim=16, model_max_length=8),
        scheduler=RFLOW(num_sampling_steps=3, use_timestep_transform=True),
        dtype=torch.float32,
    )
    sampler(model, 1, lambda: False)
    free_gathered_weights(model)
    assert all(torch.equal(local_shard(p), kept) for p, kept in zip(model.parameters(), before, strict=True))
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return world.any(world.rank == world.size - 1 and asked > 5)

    sampler(model, 2, should_stop)
    assert asked == 6


world = init_world(ParallelConfig(num_cpu_threads=1), device="cpu")
make_rounds(world, Storage(sys.argv[1]).child("zero2"), "zero2")
make_rounds(world, Storage(sys.argv[1]).child("zero3"), "zero3")
world.close()

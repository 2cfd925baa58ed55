"""What does a publish cost, its proofs included: from the learner's tensors to an engine that samples on with them?

    python benchmarks/publish.py [--requests 8] [--rounds 5] [--lr 1e-6] [--threads 1] [--model smollm2_135m]

In one process and an engine's, beside each other in every round, under `--requests` running requests:

    memcpy           the bytes of all tensors into a buffer that is there already
    reload alone     vLLM's own reload of a file that lies in shared memory, with the engine paused; nothing is checked
    publish          snapshot (copy, digests), check of the file, pause, load, digests of what is computed with, resume

and of the publish: how long the engine was paused, how long until a running request has its first token of the new
version, and how many bytes a worker on another node is sent after a step of AdamW at `--lr` from the version before.
Prints one table and writes `benchmarks/results/publish-<utc>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rounds import born_with, show, write

from rlhf_cluster.cluster.hosts import environment
from rlhf_cluster.config import Resources, RunConfig, load
from rlhf_cluster.generation.worker import GenerationWorker
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.telemetry.quiet import quiet_libraries
from rlhf_cluster.weights.copy import SnapshotCopy
from rlhf_cluster.weights.delta import Piece
from rlhf_cluster.weights.snapshot import SHARED_MEMORY, Snapshot, write_snapshot
from rlhf_cluster.weights.store import WeightStore

GOAL_S, GOAL_PAUSE_S, GOAL_DELTA = 0.5, 0.1, 0.10  # in all; beyond the reload alone; of the bytes
LONG = 4000  # tokens that a running request is asked for


@dataclass
class Weights:
    """A policy's masters, and what they are published as; `step` moves every number by the rate or leaves it."""

    masters: dict[str, torch.Tensor]
    lr: float
    steps: int = 0

    def published(self) -> dict[str, torch.Tensor]:
        return {name: tensor.bfloat16() for name, tensor in self.masters.items()}

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        for tensor in self.masters.values():
            tensor += self.lr * torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)


@dataclass
class Figures:
    """Seconds, and shares of bytes, round by round."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **one: float) -> None:
        for name, value in one.items():
            self.found.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.found[name][1:])  # the first warms up


def memcpy(tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> float:
    began, place = time.perf_counter(), 0
    for tensor in tensors.values():
        buffer[place : place + tensor.numel()].copy_(tensor.view(-1))
        place += tensor.numel()
    return time.perf_counter() - began


async def reload_alone(worker: GenerationWorker, snapshot: Snapshot) -> float:
    await worker.engine.pause_generation(mode="keep", clear_cache=True)
    began = time.perf_counter()
    await worker._load_weights(snapshot)
    seconds = time.perf_counter() - began
    await worker.engine.resume_generation()
    return seconds


@dataclass
class Request:
    """One that runs, and when its tokens came."""

    tokens: list[float] = field(default_factory=list)  # when each came
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, worker: GenerationWorker, number: int) -> None:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=LONG, ignore_eos=True, seed=number, detokenize=False)
        prompt: Any = {"prompt_token_ids": list(range(10, 50))}
        async for _ in worker.engine.generate(prompt, sampling, f"running-{number}"):
            self.tokens.append(time.perf_counter())
            self.arrived.set()

    async def first_after(self, moment: float) -> float:
        while not self.tokens or self.tokens[-1] < moment:
            self.arrived.clear()
            await self.arrived.wait()
        return next(when for when in self.tokens if when >= moment)


async def publish(
    worker: GenerationWorker, weights: Weights, version: int, directory: Path, requests: list[Request], figures: Figures
) -> Snapshot:
    tensors = weights.published()
    began = time.perf_counter()
    snapshot = write_snapshot(directory, version, tensors)
    written = time.perf_counter()
    await worker.prepare(snapshot)
    await worker.load()
    await worker.digests()
    loaded = time.perf_counter()  # nothing is sampled until it resumes
    paused = await worker.resume()
    ended = time.perf_counter()
    first = min([await request.first_after(loaded) for request in requests])
    figures.add(publish=ended - began, snapshot=written - began, paused=paused, first_token=first - began)
    return snapshot


async def measure(args: argparse.Namespace, cfg: RunConfig, policy: Path, directory: Path) -> Figures:
    figures = Figures()
    model = load_policy(policy, torch.float32, "eager")
    weights = Weights({name: p.detach().bfloat16().float() for name, p in model.named_parameters()}, args.lr)
    buffer = torch.zeros(sum(t.numel() for t in weights.masters.values()), dtype=torch.bfloat16)
    worker = GenerationWorker(str(policy), cfg.generation, cfg.weights, cfg.model.context, "bfloat16", "bench")
    await worker.start(0)
    store, copy = WeightStore("benchmark", os.getpid(), keep=2), SnapshotCopy(directory / "copy")

    async def ask(version: int, number: int, base: int | None) -> Piece:
        return store.piece(version, number, base)

    requests = [Request() for _ in range(args.requests)]
    running = [asyncio.create_task(request.run(worker, i)) for i, request in enumerate(requests)]
    for request in requests:
        await request.first_after(0.0)
    for version in range(1, args.rounds + 2):
        weights.step()
        figures.add(memcpy=memcpy(weights.published(), buffer))
        snapshot = await publish(worker, weights, version, directory, requests, figures)
        figures.add(reload=await reload_alone(worker, snapshot))
        store.add(snapshot)
        before = copy.received
        await copy.bring(snapshot, ask)
        figures.add(delta=(copy.received - before) / snapshot.bytes)
        if ended := [task for task in running if task.done()]:
            ended[0].result()
            raise RuntimeError("a running request has ended: ask for fewer rounds")
    for task in running:
        task.cancel()
    worker.stop()
    store.stop()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a publish, its proofs included.")
    for name, default in (("requests", 8), ("rounds", 5), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-6, help="of the step between two versions")
    parser.add_argument("--model", default="smollm2_135m", help="a choice of conf/model")
    args = parser.parse_args()
    quiet_libraries()
    born_with(environment(Resources(threads=args.threads)))
    ours = [f"model={args.model}", "model.context=4096", "data=sentiment", "name=publish", "reward=random"]
    cfg = load([*ours, "generation.kv_cache_memory=1073741824"], "ppo")
    policy = prepare_model(cfg.model)
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-benchmark-", dir=SHARED_MEMORY) as directory:
        figures = asyncio.run(measure(args, cfg, policy, Path(directory)))
    reload = figures.median("reload")
    goals = {
        "publish": f"<= {GOAL_S}",
        "paused": f"<= {reload + GOAL_PAUSE_S:.3f} (reload + {GOAL_PAUSE_S})",
        "delta": f"<= {GOAL_DELTA}",
    }
    names = {
        "memcpy": "memcpy of the same bytes, s",
        "reload": "vLLM's reload alone, s",
        "publish": "publish, proofs included, s",
        "snapshot": "  of it: the snapshot with its digests",
        "paused": "  of it: the engine was paused",
        "first_token": "until the first token of the new version, s",
        "delta": "bytes for another node, as a share of all",
    }
    rows = [
        [text, f"{figures.median(name):.4f}", f"{min(every[1:]):.4f}", f"{max(every[1:]):.4f}", goals.get(name, "")]
        for name, text in names.items()
        for every in (figures.found[name],)
    ]
    title = f"{args.model} in bfloat16, {args.requests} requests running, a step of {args.lr:g}, {args.threads} threads"
    show(title, ["", "median", "min", "max", "goal"], rows, [])
    write("publish", {"arguments": vars(args), "figures": figures.found})


if __name__ == "__main__":
    main()
    os._exit(0)  # an engine's threads would keep the process

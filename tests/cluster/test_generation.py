"""The generation worker around a real vLLM on the tiny model: the laws of the room, and weights that change under it.

vLLM gets a process of its own, with the variables of a worker; one start runs all checks, so it is paid once.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import laws
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.multiprocessing as multiprocessing

from rlhf_cluster.algo.logprobs import logprobs_from_logits
from rlhf_cluster.config import GenerationConfig, LoRAConfig, WeightsConfig
from rlhf_cluster.models.batching import in_order, micro_batches, singles
from rlhf_cluster.models.forward import PolicyModule
from rlhf_cluster.models.load import load_policy
from rlhf_cluster.models.lora import Adapters
from rlhf_cluster.records import Members, Rollouts
from rlhf_cluster.weights import gloo
from rlhf_cluster.weights.adapter import HEADER
from rlhf_cluster.weights.probe import Probe
from rlhf_cluster.weights.sender import Rendezvous, Sender
from rlhf_cluster.weights.snapshot import Snapshot, SnapshotError, write_snapshot

EOS, DEADLINE_S = 258, 60
LORA = LoRAConfig(rank=4, alpha=8.0, publish="adapter")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CONFIG = GenerationConfig(max_response_tokens=48, temperature=0.7, max_num_seqs=16, kv_cache_memory=1 << 26, flush_ms=5)


@dataclass(frozen=True)
class Version:
    """A policy as the learner computes with it, and what a snapshot of it holds."""

    policy: PolicyModule
    tensors: dict[str, torch.Tensor]
    header: dict[str, str]


@dataclass
class Bench:
    """The worker under test as a `rooms.Generation`, and the versions that it may receive."""

    worker: Any
    versions: dict[int, Version]
    processes: int  # of the engine
    tolerance: float  # of a logprob
    store: Path

    def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        return self.worker.sample(members)

    async def receive(self, version: int) -> None:
        await receive(self.worker, self.snapshot(version))
        await self.worker.resume()

    def snapshot(self, version: int) -> Snapshot:
        published = self.versions[version]
        return write_snapshot(self.store, version, published.tensors, published.header)

    async def sampled(self, members: Members) -> Rollouts:
        return await laws.collected(self, members)

    async def with_config(self, members: Members, **changed: Any) -> Rollouts:
        kept, self.worker._cfg = self.worker._cfg, replace(self.worker._cfg, **changed)
        try:
            return await self.sampled(members)
        finally:
            self.worker._cfg = kept

    @torch.no_grad()
    def logprobs(self, version: int, rollouts: Rollouts, temperature: float = CONFIG.temperature) -> list[np.ndarray]:
        """What the learner's forward says of the sampled tokens."""
        batches = micro_batches(rollouts.prompt_ids, rollouts.response_ids, singles(len(rollouts)), 1 << 20)
        policy = self.versions[version].policy
        parts = [batch.split(policy(*batch.policy_arguments(), temperature)[0]) for batch in batches]
        return in_order(batches, parts, len(rollouts))


def with_noise(parameters: Iterable[torch.nn.Parameter], version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for parameter in parameters if version else ():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def full(tiny: Path, version: int) -> Version:
    """Version 0 is the tiny model; each later one has noise on every parameter, the tied embedding included."""
    model = load_policy(tiny, torch.float32, "eager")
    with_noise(model.parameters(), version)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Version(PolicyModule(model, logprobs_from_logits), weights, {})


def adapted(tiny: Path, version: int) -> Version:
    """Version 0 adds nothing; each later one has noise on both matrices of every adapter. The learner's side is the
    plain model with the adapters merged into it."""
    model, plain = (load_policy(tiny, torch.float32, "eager") for _ in range(2))
    adapters = Adapters(model, LORA)
    with_noise([parameter for parameter in model.parameters() if parameter.requires_grad], version)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert not plain.load_state_dict(adapters.merged(weights), strict=False).unexpected_keys
    header = {HEADER: adapters.description()}
    return Version(PolicyModule(plain, logprobs_from_logits), adapters.alone(weights), header)


def largest(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(some, others, strict=True))


async def answers_every_member_once(bench: Bench) -> None:
    await laws.every_member_is_answered_once(bench, CONFIG.max_response_tokens)


async def gives_a_seed_its_response_in_any_company(bench: Bench) -> None:
    await laws.a_seed_gives_its_response_in_any_company(bench)


async def logprobs_are_the_learners(bench: Bench) -> None:
    """At the sampling temperature, for every token."""
    found = await bench.sampled(laws.members(8))
    assert largest(found.rollout_logprobs, bench.logprobs(0, found)) < bench.tolerance
    assert {int(v) for row in found.weight_versions for v in row} == {0}
    assert set(found.incarnation) == {"generation-0-1"} and set(found.temperature.tolist()) == {np.float32(0.7)}
    assert largest(found.rollout_logprobs, bench.logprobs(0, found, 1.0)) > 0.01


async def eos_stays_as_the_last_token(bench: Bench) -> None:
    found = await bench.sampled(laws.members(48))
    ended = [ids for ids, reason in zip(found.response_ids, found.finish_reason, strict=True) if reason == "stop"]
    assert 0 < len(ended) < 48
    assert all(ids[-1] == EOS and EOS not in ids[:-1] for ids in ended)


async def eos_at_the_very_last_place_is_an_end(bench: Bench) -> None:
    """And part of the response: those that end with their last allowed token have stopped, not been cut off."""
    found = await bench.with_config(laws.members(600), max_response_tokens=1)
    assert [len(ids) for ids in found.response_ids] == [1] * 600
    ended = [reason == "stop" for reason in found.finish_reason]
    assert any(ended) and ended == [ids[-1] == EOS for ids in found.response_ids]


async def prompts_that_do_not_fit_one_step_are_all_answered(bench: Bench) -> None:
    """16 run at once, of 260 tokens each: more than the engine takes in one step, so some wait."""
    members = laws.members(32)
    long = pa.array([np.resize(ids, 260).tolist() for ids in members.prompt_ids], Members.COLUMNS["prompt_ids"].type)
    place = members.table.column_names.index("prompt_ids")
    found = await bench.sampled(Members(members.table.set_column(place, "prompt_ids", long)))
    assert sorted(found.sample_id) == sorted(members.sample_id)
    assert largest(found.rollout_logprobs, bench.logprobs(0, found)) < bench.tolerance


async def ignoring_eos_gives_the_exact_length(bench: Bench) -> None:
    found = await bench.with_config(laws.members(16), ignore_eos=True, max_response_tokens=40)
    assert [len(ids) for ids in found.response_ids] == [40] * 16
    assert set(found.finish_reason) == {"length"}


async def received_weights_are_sampled_from(bench: Bench) -> None:
    """Embedding, head and layers alike: a tied LM head that stayed behind would show here."""
    await bench.receive(1)
    found = await bench.sampled(laws.members(8))
    assert largest(found.rollout_logprobs, bench.logprobs(1, found)) < bench.tolerance
    assert largest(found.rollout_logprobs, bench.logprobs(0, found)) > 0.1
    assert {int(v) for row in found.weight_versions for v in row} == {1}
    await bench.receive(1)  # once more changes nothing
    assert await bench.worker.version() == 1


async def receive(worker: Any, snapshot: Snapshot, again: bool = False) -> None:
    await worker.prepare(snapshot, again)
    await worker.load()


async def under_running_requests(bench: Bench, version: int, weights: WeightsConfig) -> Rollouts:
    """Eight responses of 200 tokens, in whose midst `version` comes."""
    members = laws.members(8, step=5)
    kept, bench.worker._weights = bench.worker._weights, weights
    sampling = asyncio.create_task(bench.with_config(members, ignore_eos=True, max_response_tokens=200))
    snapshot = bench.snapshot(version)
    await asyncio.sleep(0.2)
    await receive(bench.worker, snapshot)
    await bench.worker.resume()
    found = await sampling
    bench.worker._weights = kept
    assert [len(ids) for ids in found.response_ids] == [200] * 8
    assert sorted(found.sample_id) == sorted(members.sample_id)
    return found


def off_by(bench: Bench, found: Rollouts) -> float:
    """How far a token's logprob is from what its own version says of it, given all tokens before it."""
    rows = found.weight_versions
    by_version = {int(v): bench.logprobs(int(v), found) for v in np.unique(np.concatenate(rows))}
    expected = [np.array([by_version[int(v)][i][t] for t, v in enumerate(row)]) for i, row in enumerate(rows)]
    return largest(found.rollout_logprobs, expected)


async def weights_change_under_running_requests(bench: Bench) -> None:
    """Each token carries the version that sampled it, and has that version's logprob given all tokens before it."""
    found = await under_running_requests(bench, 2, WeightsConfig())
    assert all((np.diff(row) >= 0).all() for row in found.weight_versions)
    assert {int(v) for row in found.weight_versions for v in row} == {1, 2}, "the update did not meet running requests"
    assert off_by(bench, found) < bench.tolerance


async def requests_may_end_with_the_old_weights(bench: Bench) -> None:
    found = await under_running_requests(bench, 3, WeightsConfig(running="finish"))
    assert {int(v) for row in found.weight_versions for v in row} == {2} and await bench.worker.version() == 3
    assert off_by(bench, found) < bench.tolerance


async def requests_may_begin_again_with_the_new_weights(bench: Bench) -> None:
    found = await under_running_requests(bench, 1, WeightsConfig(running="abort"))
    assert {int(v) for row in found.weight_versions for v in row} == {1}
    assert off_by(bench, found) < bench.tolerance


async def keys_and_values_of_the_old_weights_may_stay(bench: Bench) -> None:
    """What the new weights then say of a token is not what they would say alone: that is the price."""
    found = await under_running_requests(bench, 2, WeightsConfig(kv="keep"))
    assert {int(v) for row in found.weight_versions for v in row} == {1, 2}
    assert off_by(bench, found) > 100 * bench.tolerance


async def marks_tokens_with_the_version_received(bench: Bench) -> None:
    await laws.received_versions_stand_on_later_tokens(bench, [3, 1])


async def a_damaged_snapshot_is_refused_and_the_old_weights_serve(bench: Bench) -> None:
    good = bench.snapshot(3)
    bad = replace(good, buckets=(*good.buckets[:-1], replace(good.buckets[-1], digest="0" * 16)))
    with pytest.raises(SnapshotError, match="has digest"):
        await asyncio.wait_for(receive(bench.worker, bad), DEADLINE_S)
    assert await bench.worker.version() == 0
    found = await asyncio.wait_for(bench.sampled(laws.members(8)), DEADLINE_S)
    assert largest(found.rollout_logprobs, bench.logprobs(0, found)) < bench.tolerance


async def engines_with_the_same_weights_have_the_same_digests(bench: Bench) -> None:
    """And one with others differs in every module that learns, packed weights and adapters included."""
    worker = bench.worker
    found = []
    for version in (1, 1, 2):
        await receive(worker, bench.snapshot(version), again=True)
        found.append(await worker.digests())
    first, again, other = found
    assert await worker.resume() > 0 and await worker.resume() == 0
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    projections = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert sum(name.endswith(projections) for name in changed) == 2 * len(projections) * bench.processes
    if not worker._adapter_rank:
        assert {"0:model.embed_tokens", "0:lm_head", "0:model.norm"} <= changed
    assert first.keys() - changed  # what does not learn is the same


async def a_probe_says_whether_it_is_the_learners_policy(bench: Bench) -> None:
    await bench.receive(1)
    found = await bench.sampled(laws.members(4))
    for version, low, high in ((1, 0.0, bench.tolerance), (2, 0.05, 10.0)):
        told = bench.logprobs(version, found, 1.0)[0].tolist()
        probe = Probe(tuple(found.prompt_ids[0].tolist()), tuple(found.response_ids[0].tolist()), tuple(told))
        assert low <= await bench.worker.probe(probe) < high
        assert low <= await bench.worker.probe(probe) < high  # what is cached hides nothing


@dataclass
class OneEngine:
    """The worker as vLLM's trainer engines ask it, from a thread of their own."""

    worker: Any
    version: int
    loop: asyncio.AbstractEventLoop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._ask(self.worker.open_direct("gloo", init_info))

    def start_weight_update(self) -> None:
        self._ask(self.worker.begin_direct())

    def update_weights(self, update_info: Any) -> None:
        self._ask(self.worker.take_direct(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask(self.worker.end_direct(self.version))

    def _ask(self, answer: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(answer, self.loop).result(DEADLINE_S)


def send(bench: Bench, version: int, loop: asyncio.AbstractEventLoop) -> None:
    """Over gloo, as the learner does; the engine waits for `resume` then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tensors = bench.versions[version].tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    at = Rendezvous("gloo", 0, "127.0.0.1", port, bench.processes, DEADLINE_S)
    Sender(at, OneEngine(bench.worker, version, loop), shapes, torch.float32, tensors.items).send()


async def weights_may_come_straight_from_the_learner(bench: Bench) -> None:
    if bench.worker._adapter_rank:
        return  # whole weights come that way, no adapters
    await bench.receive(1)
    await asyncio.to_thread(send, bench, 2, asyncio.get_running_loop())
    assert bench.worker.holds(2)
    assert await bench.worker.resume() > 0
    found = await bench.sampled(laws.members(8))
    assert largest(found.rollout_logprobs, bench.logprobs(2, found)) < bench.tolerance
    assert {int(v) for row in found.weight_versions for v in row} == {2}


async def what_comes_damaged_is_not_held_and_then_loaded_from_the_store(bench: Bench) -> None:
    if bench.worker._adapter_rank:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo, "digest", lambda flat: torch.zeros(gloo.DIGEST, dtype=torch.uint8))  # as the sender sees it
        await asyncio.to_thread(send, bench, 3, asyncio.get_running_loop())
    assert not bench.worker.holds(3)
    await bench.receive(3)
    found = await bench.sampled(laws.members(8))
    assert largest(found.rollout_logprobs, bench.logprobs(3, found)) < bench.tolerance


async def what_comes_damaged_in_the_midst_of_a_layer_is_loaded_anew_with_all_of_it(bench: Bench) -> None:
    """Of queries, keys and values, which the engine holds as one, the queries had come well."""
    if bench.worker._adapter_rank:
        return
    names, digests = list(bench.versions[1].tensors), iter(range(1 << 20))
    bad = names.index("model.layers.0.self_attn.k_proj.weight")
    assert names[bad - 1] == "model.layers.0.self_attn.q_proj.weight"
    right = gloo.digest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gloo, "Meeting", partial(gloo.Meeting, bucket=1))  # each tensor in one of its own
        patch.setattr(gloo, "digest", lambda flat: right(flat) ^ 1 if next(digests) == bad else right(flat))
        await asyncio.to_thread(send, bench, 1, asyncio.get_running_loop())
    assert next(digests) == len(names) and not bench.worker.holds(1)
    await bench.receive(1)
    found = await bench.sampled(laws.members(8))
    assert largest(found.rollout_logprobs, bench.logprobs(1, found)) < bench.tolerance


CHECKS = (
    answers_every_member_once,
    gives_a_seed_its_response_in_any_company,
    logprobs_are_the_learners,
    eos_stays_as_the_last_token,
    eos_at_the_very_last_place_is_an_end,
    prompts_that_do_not_fit_one_step_are_all_answered,
    ignoring_eos_gives_the_exact_length,
    a_damaged_snapshot_is_refused_and_the_old_weights_serve,
    received_weights_are_sampled_from,
    weights_change_under_running_requests,
    requests_may_end_with_the_old_weights,
    requests_may_begin_again_with_the_new_weights,
    keys_and_values_of_the_old_weights_may_stay,
    marks_tokens_with_the_version_received,
    engines_with_the_same_weights_have_the_same_digests,
    a_probe_says_whether_it_is_the_learners_policy,
    weights_may_come_straight_from_the_learner,
    what_comes_damaged_is_not_held_and_then_loaded_from_the_store,
    what_comes_damaged_in_the_midst_of_a_layer_is_loaded_anew_with_all_of_it,
)


# What is published, how far a logprob may be off, and over how many processes each layer is split.
KINDS = {"weights": (0, full, 1e-5, 1), "adapters": (LORA.rank, adapted, 1e-4, 1), "split": (0, full, 1e-5, 2)}


async def run_checks(tiny: Path, directory: Path, kind: str) -> dict[str, str]:
    from rlhf_cluster.generation.worker import GenerationWorker

    rank, publish, tolerance, processes = KINDS[kind]
    versions = {version: publish(tiny, version) for version in range(4)}
    cfg = replace(CONFIG, tensor_parallel=processes)
    worker = GenerationWorker(str(tiny), cfg, WeightsConfig(), 320, "float32", "generation-0-1", rank)
    assert await worker.start(0) == "generation-0-1"
    bench, found = Bench(worker, versions, processes, tolerance, directory / "store"), {}
    try:
        await bench.receive(0)  # of full weights it is what serves already
        for check in CHECKS:
            found[check.__name__] = await outcome(check(bench))
    finally:
        worker.stop()
    return found


async def outcome(check: Coroutine[Any, Any, None]) -> str:
    """The traceback of a check that fails."""
    began = time.perf_counter()
    try:
        await asyncio.wait_for(check, 2 * DEADLINE_S)
    except Exception:
        return traceback.format_exc()
    finally:
        print(f"{check.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
    return ""


def in_child(_: int, tiny: str, directory: str, kind: str) -> None:
    found = asyncio.run(run_checks(Path(tiny), Path(directory), kind))
    Path(directory, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=KINDS)
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, str]:
    """By check, the traceback of its failure, or nothing."""
    directory = tmp_path_factory.mktemp("generation")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in ENVIRONMENT.items():
            patch.setenv(variable, value)
        multiprocessing.spawn(in_child, (str(tiny), str(directory), request.param), nprocs=1)
    return json.loads((directory / "found.json").read_text())


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_generation(found: dict[str, str], check: str) -> None:
    if found[check]:
        pytest.fail(found[check], pytrace=False)

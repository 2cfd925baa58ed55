"""One generation worker: a vLLM `AsyncLLM`, sampled from and kept current with published weights."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import pickle
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from rlhf_cluster.config import GenerationConfig, WeightsConfig
from rlhf_cluster.generation.memory import gpu_share, kv_cache_memory
from rlhf_cluster.models.load import load_config, resolve_dtype
from rlhf_cluster.records import Members, Rollouts
from rlhf_cluster.weights.adapter import unpack
from rlhf_cluster.weights.plugin import BACKEND, DIRECT
from rlhf_cluster.weights.probe import Probe
from rlhf_cluster.weights.snapshot import Snapshot, check

# vLLM is loaded where a worker starts: loading it takes a quarter of a minute, which the driver, who only names the
# class, need not wait for.
if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput
    from vllm.v1.engine import PauseMode
    from vllm.v1.engine.async_llm import AsyncLLM

ADAPTER = "policy"  # the name of the only one
CPU_BLOCK = 32  # tokens; the CPU build's attention is fast at multiples of it
ABORTED = "abort"  # the end of a request that a pause cut off
INSPECTION = "rlhf_cluster.weights.receiver.Inspection"
PAUSES: dict[str, PauseMode] = {"keep": "keep", "finish": "wait", "abort": "abort"}  # vLLM's word for `weights.running`


class GenerationWorker:
    """Samples one response per member. `incarnation` names this life of the worker and stands on every rollout.

    `adapter_rank`: what is published are adapters of this rank, to be added to the model's weights; 0: full weights.
    """

    def __init__(
        self,
        model_path: str,
        cfg: GenerationConfig,
        weights: WeightsConfig,
        context: int,
        dtype: str,
        incarnation: str,
        adapter_rank: int = 0,
    ) -> None:
        self._model_path, self._cfg, self._weights, self._context = model_path, cfg, weights, context
        self._dtype, self._incarnation, self._adapter_rank = dtype, incarnation, adapter_rank
        self._engine: AsyncLLM | None = None
        self._adapter: LoRARequest | None = None
        self._held: int | None = None  # the version that was loaded last, and wholly
        self._at_hand: Snapshot | None = None  # that waits to be loaded
        self._paused: float | None = None  # since when nothing is sampled
        self._probes = itertools.count()
        self._came = 0

    def _engine_args(self) -> AsyncEngineArgs:
        from vllm.config import WeightTransferConfig
        from vllm.config.lora import MaxLoRARanks
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform

        block, dtype = CPU_BLOCK if current_platform.is_cpu() else 0, resolve_dtype(self._dtype)
        return AsyncEngineArgs(
            model=self._model_path,
            dtype=str(dtype).removeprefix("torch."),
            max_model_len=self._context,
            max_num_seqs=self._cfg.max_num_seqs,
            enforce_eager=self._cfg.enforce_eager,
            # After part of a prompt vLLM winds a seeded request's generator back, which only GPU generators can.
            enable_chunked_prefill=False if current_platform.is_cpu() else None,
            # Whole blocks alone are shared by the responses to a prompt, and the CPU build's own 128 is more than most
            # prompts have.
            block_size=block or None,
            kv_cache_memory_bytes=kv_cache_memory(
                load_config(Path(self._model_path)), dtype, self._cfg, self._context, block
            ),
            # Without a GPU it is not used, but the CPU build checks at start that so much is free.
            gpu_memory_utilization=0.3 if block else gpu_share(self._cfg),
            tensor_parallel_size=self._cfg.tensor_parallel,
            logprobs_mode="processed_logprobs",  # after temperature: what the tokens were really drawn from
            generation_config="vllm",  # no sampling defaults from the model's directory
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            worker_extension_cls=INSPECTION,
            enable_lora=self._adapter_rank > 0,
            max_loras=1,
            max_lora_rank=next(rank for rank in get_args(MaxLoRARanks) if rank >= self._adapter_rank),
        )

    @property
    def engine(self) -> AsyncLLM:
        if self._engine is None:
            raise RuntimeError("the generation worker is not started")
        return self._engine

    async def start(self, version: int) -> str:
        """Loads the model, whose weights are those of `version`. Returns the incarnation."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(self._engine_args())
        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        await self.engine.update_weight_version(str(version))
        self._held = None if self._adapter_rank else version
        return self._incarnation

    async def sample(self, members: Members) -> AsyncIterator[Rollouts]:
        """Yields what ended within `flush_ms` as one table, until every member has its response."""
        ended: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        prompts, seeds, ids = members.prompt_ids, members.seed, members.sample_id
        async with asyncio.TaskGroup() as requests:
            for row in range(len(members)):
                prompt = {"prompt_token_ids": prompts[row].tolist()}
                requests.create_task(self._request(row, prompt, int(seeds[row]), ids[row], ended))
            remaining = len(members)
            while remaining:
                outputs = await self._flush(ended, remaining)
                remaining -= len(outputs)
                yield self._rollouts(members, outputs)

    async def _request(self, row: int, prompt: Any, seed: int, sample_id: str, ended: asyncio.Queue[Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            temperature=self._cfg.temperature,
            max_tokens=self._cfg.max_response_tokens,
            ignore_eos=self._cfg.ignore_eos,
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else every token of every response passes through this process
        )
        for life in itertools.count():
            output = await self._finished(prompt, sampling, f"{sample_id}#{life}")
            if output.outputs[0].finish_reason != ABORTED:
                break
        ended.put_nowait((row, output))

    async def _finished(self, prompt: Any, sampling: SamplingParams, request_id: str) -> RequestOutput:
        output: RequestOutput | None = None
        async for latest in self.engine.generate(prompt, sampling, request_id, lora_request=self._adapter):
            output = latest
        if output is None or not output.finished:
            raise RuntimeError(f"vLLM gave no finished response for request {request_id}")
        return output

    async def _flush(
        self, ended: asyncio.Queue[tuple[int, RequestOutput]], remaining: int
    ) -> list[tuple[int, RequestOutput]]:
        """Waits for one response, then for `flush_ms` more or for all that remain, and takes what ended."""
        outputs = [await ended.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(self._cfg.flush_ms / 1000):
                while len(outputs) < remaining:
                    outputs.append(await ended.get())
        return outputs

    def _rollouts(self, members: Members, outputs: list[tuple[int, RequestOutput]]) -> Rollouts:
        rows = members.take([row for row, _ in outputs])
        completions = [output.outputs[0] for _, output in outputs]
        columns = {
            "response_ids": [list(c.token_ids) for c in completions],
            "rollout_logprobs": [
                [step[token].logprob for token, step in zip(c.token_ids, c.logprobs, strict=True)] for c in completions
            ],
            "weight_versions": [_versions(c) for c in completions],
            "finish_reason": [c.finish_reason for c in completions],
            "temperature": [self._cfg.temperature] * len(outputs),
            "incarnation": [self._incarnation] * len(outputs),
        }
        return rows.extend(Rollouts, columns)

    async def prepare(self, snapshot: Snapshot, again: bool = False) -> None:
        """A published version is what `load` then loads, and was checked: a bad one must not find the engine paused.

        The version that serves already is not loaded, unless it is to be `again`.
        """
        self._at_hand = None
        if again or not self.holds(snapshot.version):
            await asyncio.to_thread(check, snapshot)
            self._at_hand = snapshot

    async def load(self) -> None:
        """What was prepared, under running requests, which fare as `weights.running` and `weights.kv` say; samples no
        more until `resume`."""
        if self._at_hand is not None:
            await self.pause()
            self._held = None
            await (self._load_adapter if self._adapter_rank else self._load_weights)(self._at_hand)
            self._held = self._at_hand.version

    async def open_direct(self, transport: str, told: dict[str, Any]) -> None:
        """Meets the learner, whose weights then come without the store."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        opening = {"direct": DIRECT[transport], "told": told}
        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=opening))

    async def begin_direct(self) -> None:
        await self.pause()
        self._held = None
        await self.engine.start_weight_update()

    async def take_direct(self, told: dict[str, Any]) -> None:
        """Loads what the learner sends meanwhile."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._came += bytes_of(told)
        await self.engine.update_weights(WeightTransferUpdateRequest(update_info={"told": pickle.dumps(told)}))

    def came(self) -> int:
        """Bytes that the learner sent since this was last asked."""
        came, self._came = self._came, 0
        return came

    async def end_direct(self, version: int) -> None:
        """The engine computes with `version`, and samples nothing until `resume`. What came damaged is named in the
        log, and the version is not held then: it is loaded from the store."""
        damaged = next(filter(None, await self.engine.collective_rpc("damaged_weights")), "")
        if damaged:
            logging.getLogger(__name__).warning("%s came damaged; it will be loaded from the store", damaged)
        await self.engine.finish_weight_update(weight_version=None if damaged else str(version))
        self._held = None if damaged else version

    async def digests(self) -> dict[str, str]:
        """Of what the engine computes with, by its rank and module."""
        found = await self.engine.collective_rpc("weight_digests")
        return {f"{rank}:{name}": digest for rank, of in enumerate(found) for name, digest in of.items()}

    def holds(self, version: int) -> bool:
        """Whether it need not be loaded. The engine is not asked: it would answer once its step has ended."""
        return self._held == version

    async def pause(self) -> None:
        """Samples no more until `resume`."""
        if self._paused is None:
            self._paused = time.perf_counter()
            mode, clear = PAUSES[self._weights.running], self._weights.kv == "recompute"
            await self.engine.pause_generation(mode=mode, clear_cache=clear)

    async def resume(self) -> float:
        """Samples on; returns the seconds that it did not."""
        if self._paused is None:
            return 0.0
        await self.engine.resume_generation()
        began, self._paused = self._paused, None
        return time.perf_counter() - began

    async def probe(self, probe: Probe) -> float:
        """How far the engine's logprobs are from the learner's, in nats per token."""
        from vllm import SamplingParams

        whole: Any = {"prompt_token_ids": [*probe.prompt_ids, *probe.response_ids]}
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._finished(whole, sampling, f"probe#{next(self._probes)}")
        assert output.prompt_logprobs is not None
        told = zip(probe.response_ids, output.prompt_logprobs[len(probe.prompt_ids) :], strict=True)
        return probe.distance([at[token].logprob for token, at in told if at is not None])

    async def _load_weights(self, snapshot: Snapshot) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.engine.start_weight_update()
        await self.engine.update_weights(WeightTransferUpdateRequest(update_info={"path": snapshot.path}))
        await self.engine.finish_weight_update(weight_version=str(snapshot.version))

    async def _load_adapter(self, snapshot: Snapshot) -> None:
        """In the place of the one before, so that running requests, which name it, go on with it."""
        from vllm.lora.request import LoRARequest

        path = str(unpack(snapshot, self._incarnation))
        if not await self.engine.add_lora(LoRARequest(ADAPTER, 1, path, load_inplace=True)):
            raise RuntimeError(f"vLLM did not take the adapter of version {snapshot.version}")
        await self.engine.update_weight_version(str(snapshot.version))
        self._adapter = LoRARequest(ADAPTER, 1, path)

    async def version(self) -> int:
        return int(await self.engine.get_weight_version())

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


def bytes_of(told: Mapping[str, Any]) -> int:
    """Of the tensors that vLLM is told will come."""
    pairs = zip(told["dtype_names"], told["shapes"], strict=True)
    return sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in pairs)


def _versions(completion: Any) -> list[int]:
    """One weight version per response token, from vLLM's contiguous spans."""
    versions = [int(span.version) for span in completion.weight_versions for _ in range(span.start, span.end)]
    if len(versions) != len(completion.token_ids):
        raise RuntimeError(f"vLLM labelled {len(versions)} of {len(completion.token_ids)} tokens with a weight version")
    return versions

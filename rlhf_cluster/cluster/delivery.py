"""A published version on its way to every generation worker of a pool, and the proof that it arrived.

Before anything is loaded, what came has the digests that were published (`weights`). Once it is loaded, all engines
must compute with the same, before any of them samples; and now and then each says its logprobs of a response that the
learner has said its own of, for which it has to sample already. A worker that fails a proof brings and loads the
version once more, and ends the run where it fails again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerDied, WorkerError
from rlhf_cluster.config import WeightsConfig
from rlhf_cluster.weights.snapshot import Snapshot


@dataclass(frozen=True)
class WeightChannel:
    """How a version gets from the learner to the generation workers: the store, and the names of what it keeps."""

    store: Host
    node: str
    directory: str
    run: str
    attempt: int
    cfg: WeightsConfig

    def is_probed(self, version: int) -> bool:
        return self.cfg.probe_every > 0 and version % self.cfg.probe_every == 0


@dataclass
class Turn:
    """One worker's, and what there is to say of it; `off`: nats per token that its logprobs are from the learner's."""

    host: Host
    bytes: int = 0
    loads: int = 0
    paused_s: float = 0.0
    off: float | None = None


Step = Callable[[Turn], Awaitable[None]]
Refuted = Mapping[int, str]  # by a worker's number, why it is not right


class Delivery:
    """Of one version to all workers of a pool. They sample from the one before until all have it at hand, load at once,
    and sample on together: none of them with weights that the others have not confirmed."""

    def __init__(self, channel: WeightChannel, snapshot: Snapshot, deadline_s: float) -> None:
        self._channel, self._snapshot, self._deadline_s = channel, snapshot, deadline_s

    async def to(self, hosts: Sequence[Host]) -> dict[str, float]:
        """Returns its metrics once all of them sample from the version: seconds in all, bytes of all workers, the
        longest that a worker sampled nothing for, how often one had to load again, and what the worst probe found."""
        began = time.perf_counter()
        turns = [Turn(host) for host in hosts]
        for step in (self._fetch, self._load):
            await self._each(turns, step)
        await self._prove(turns, self._compare)
        await self._each(turns, self._resume)
        await self._prove(turns, self._probe, self._resume)
        off = [turn.off for turn in turns if turn.off is not None]
        return {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(turn.bytes for turn in turns)),
            "sync/paused_s": max(turn.paused_s for turn in turns),
            "sync/loaded_again": float(sum(turn.loads - 1 for turn in turns)),
            **({"sync/probe": max(off)} if off else {}),
        }

    async def _prove(
        self, turns: Sequence[Turn], proof: Callable[[Sequence[Turn]], Awaitable[Refuted]], *after: Step
    ) -> None:
        """Those that are refuted load once more, with what comes `after`. Raises WorkerError where that does not
        help."""
        again = [turns[number] for number in await proof(turns)]
        for step in (self._load_again, *after):
            await self._each(again, step)
        for number, why in (await proof(turns) if again else {}).items():
            raise WorkerError(f"{why}; loading them once more did not mend it (its log: {turns[number].host.log})")

    async def _each(self, turns: Sequence[Turn], step: Step) -> None:
        await asyncio.gather(*map(step, turns))

    async def _ask(self, turn: Turn, verb: str, *args: Any) -> Any:
        return await turn.host.ask(verb, *args, deadline_s=self._deadline_s)

    async def _fetch(self, turn: Turn) -> None:
        """What it has at hand then is what was published; where it is not, it brings it once more."""
        try:
            await self._bring(turn, again=False)
        except WorkerDied:
            raise
        except WorkerError:
            await self._bring(turn, again=True)

    async def _bring(self, turn: Turn, again: bool) -> None:
        channel = self._channel
        place = (channel.node, channel.run, channel.attempt)
        turn.bytes += await self._ask(turn, "fetch", channel.store.actor, self._snapshot, place, again)

    async def _load(self, turn: Turn) -> None:
        await self._ask(turn, "load")
        turn.loads += 1

    async def _load_again(self, turn: Turn) -> None:
        """Paused first: what it samples from is not what it should be."""
        await self._ask(turn, "pause")
        await self._bring(turn, again=True)
        await self._load(turn)

    async def _resume(self, turn: Turn) -> None:
        turn.paused_s += await self._ask(turn, "resume")

    async def _compare(self, turns: Sequence[Turn]) -> Refuted:
        """Those that do not compute with what most of them compute with; where there is no such, all of them."""
        if not self._channel.cfg.compare or len(turns) < 2:
            return {}
        digests = await asyncio.gather(*(self._ask(turn, "digests") for turn in turns))
        alike = [digests.count(own) for own in digests]
        right = alike.index(max(alike))
        agreed = 2 * alike[right] > len(turns)
        wrong = {}
        for number, own in enumerate(digests):
            other = right if agreed else number - 1  # the last one's stands before the first
            if unlike := sorted(of for of, digest in digests[other].items() if own.get(of) != digest):
                some = ", ".join(unlike[:3]) + (", ..." if len(unlike) > 3 else "")
                wrong[number] = (
                    f"{turns[number].host.name} computes with other weights of version {self._snapshot.version} than "
                    f"{turns[other].host.name} does in {len(unlike)} modules ({some})"
                )
        return wrong

    async def _probe(self, turns: Sequence[Turn]) -> Refuted:
        """Those whose logprobs are too far from the learner's, where that is looked at; they sample for it."""
        probe, most = self._snapshot.probe, self._channel.cfg.probe_tolerance
        if probe is None:
            return {}

        async def ask(turn: Turn) -> None:
            turn.off = await self._ask(turn, "probe", probe)

        await self._each([turn for turn in turns if turn.off is None or not turn.off <= most], ask)
        return {
            number: f"{turn.host.name}'s logprobs are not the learner's with weights of version "
            f"{self._snapshot.version}: {turn.off:.3g} nats a token from them on a response of "
            f"{len(probe.response_ids)}, where weights.probe_tolerance={most:g}"
            for number, turn in enumerate(turns)
            if turn.off is not None and not turn.off <= most
        }

"""A published version on its way to every generation worker of a pool, and the proof that it arrived.

Before anything is loaded, what came has the digests that were published (`weights`). Once it is loaded, all engines
must compute with the same, before any of them samples; and now and then each says its logprobs of a response that the
learner has said its own of, for which it has to sample already. A worker that fails a proof brings and loads the
version once more, and is lost where it fails again; where all of them do, it is not the workers, and the run ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError, WorkerLost
from rlhf_cluster.config import WeightsConfig
from rlhf_cluster.weights.snapshot import Snapshot


@dataclass
class WeightChannel:
    """How a version gets from the learner to the generation workers: the store, which another may take the place of,
    and the names of what it keeps."""

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
    digests: Mapping[str, str] = field(default_factory=dict)  # of what it computes with


Step = Callable[[Turn], Awaitable[None]]
Refuted = list[tuple[Turn, str]]  # who is not right, and why
Proof = Callable[[list[Turn]], Awaitable[Refuted]]


class Delivery:
    """Of one version to all workers of a pool. They sample from the one before until all have it at hand, load at once,
    and sample on together: none of them with weights that the others have not confirmed."""

    def __init__(
        self, channel: WeightChannel, snapshot: Snapshot, deadline_s: float, witness: Host | None = None
    ) -> None:
        """`witness`: samples from the version already, and the others are to compute with what it does."""
        self._channel, self._snapshot, self._deadline_s, self._witness = channel, snapshot, deadline_s, witness
        self.lost: list[tuple[Host, WorkerLost]] = []  # on the way, and by what

    async def to(self, hosts: Sequence[Host]) -> dict[str, float]:
        """Returns its metrics once all that are not `lost` sample from the version: seconds in all, bytes of all
        workers, the longest that a worker sampled nothing for, how often one had to load again, and what the worst
        probe found."""
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
            "sync/paused_s": max((turn.paused_s for turn in turns), default=0.0),
            "sync/loaded_again": float(sum(turn.loads - 1 for turn in turns)),
            **({"sync/probe": max(off)} if off else {}),
        }

    async def _prove(self, turns: list[Turn], proof: Proof, *after: Step) -> None:
        """Those that are refuted load once more, with what comes `after`; where that does not help they are lost, or
        WorkerError is raised where it would be all of them."""
        if not (refuted := await proof(turns)):
            return
        for step in (self._load_again, *after):
            await self._each(turns, step, [turn for turn, _ in refuted if turn in turns])
        refuted = await proof(turns)
        hopeless = len(refuted) == len(turns) and self._witness is None
        for turn, why in refuted:
            told = f"{why}; loading them once more did not mend it (its log: {turn.host.log})"
            if hopeless:
                raise WorkerError(told)
            self._lose(turns, turn, WorkerLost(told))

    async def _each(self, turns: list[Turn], step: Step, those: Sequence[Turn] | None = None) -> None:
        """A step of all, or of `those` among them; whoever is lost in it is left behind."""
        asked = list(turns if those is None else those)
        found = await asyncio.gather(*map(step, asked), return_exceptions=True)
        for turn, error in zip(asked, found, strict=True):
            if isinstance(error, WorkerLost):
                self._lose(turns, turn, error)
            elif isinstance(error, BaseException):
                raise error

    def _lose(self, turns: list[Turn], turn: Turn, error: WorkerLost) -> None:
        if turn in turns:
            turns.remove(turn)
            self.lost.append((turn.host, error))

    async def _ask(self, turn: Turn, verb: str, *args: Any) -> Any:
        return await turn.host.ask(verb, *args, deadline_s=self._deadline_s)

    async def _fetch(self, turn: Turn) -> None:
        """What it has at hand then is what was published; where it is not, it brings it once more."""
        try:
            await self._bring(turn, again=False)
        except WorkerLost:
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

    async def _look(self, turn: Turn) -> None:
        turn.digests = await self._ask(turn, "digests")

    async def _compare(self, turns: list[Turn]) -> Refuted:
        """Those that do not compute with what the witness computes with, or else most of them; where there is no such,
        all of them."""
        witness = [] if self._witness is None else [Turn(self._witness)]
        if not self._channel.cfg.compare or len(turns) + len(witness) < 2:
            return []
        for those in (turns, witness):
            await self._each(those, self._look)
        alike = [[other.digests for other in turns].count(turn.digests) for turn in turns]
        agreed = next((turn for turn, count in zip(turns, alike, strict=True) if 2 * count > len(turns)), None)
        right = witness[0] if witness else agreed
        wrong = []
        for number, turn in enumerate(turns):
            other = right or turns[number - 1]  # the last one's stands before the first
            if unlike := sorted(of for of, digest in other.digests.items() if turn.digests.get(of) != digest):
                some = ", ".join(unlike[:3]) + (", ..." if len(unlike) > 3 else "")
                versus = f"version {self._snapshot.version} than {other.host.name} does"
                why = f"{turn.host.name} computes with other weights of {versus} in {len(unlike)} modules ({some})"
                wrong.append((turn, why))
        return wrong

    async def _ask_probe(self, turn: Turn) -> None:
        turn.off = await self._ask(turn, "probe", self._snapshot.probe)

    async def _probe(self, turns: list[Turn]) -> Refuted:
        """Those whose logprobs are too far from the learner's, where that is looked at; they sample for it."""
        probe, most = self._snapshot.probe, self._channel.cfg.probe_tolerance
        if probe is None:
            return []

        def is_far(turn: Turn) -> bool:
            return turn.off is None or not turn.off <= most

        await self._each(turns, self._ask_probe, [turn for turn in turns if is_far(turn)])
        return [
            (
                turn,
                f"{turn.host.name}'s logprobs are not the learner's with weights of version {self._snapshot.version}: "
                f"{turn.off:.3g} nats a token from them on a response of {len(probe.response_ids)}, where "
                f"weights.probe_tolerance={most:g}",
            )
            for turn in turns
            if is_far(turn)
        ]

"""A published version on its way to every generation worker of a pool, and the proof that it arrived.

Before anything is loaded, what came has the digests that were published (`weights`). Once it is loaded, all engines
must compute with the same, before they sample; and now and then each says its logprobs of a response that the learner
has said its own of, for which it has to sample already. A worker that fails a proof loads once more, and ends the run
where it fails again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cluster.cluster.hosts import Host
from rlhf_cluster.cluster.waits import WorkerError
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


@dataclass(frozen=True)
class Delivered:
    """What there is to say of one worker's turn; `off`: nats per token that its logprobs are from the learner's."""

    bytes: int
    paused_s: float
    off: float | None
    times: int  # that it loaded


class Delivery:
    """Of one version. The worker that arrives first says what all others are to compute with."""

    def __init__(self, channel: WeightChannel, snapshot: Snapshot, deadline_s: float) -> None:
        self._channel, self._snapshot, self._deadline_s = channel, snapshot, deadline_s
        self._first: tuple[str, Mapping[str, str]] | None = None

    async def to(self, hosts: Sequence[Host]) -> dict[str, float]:
        """Returns its metrics once all of them sample from the version: seconds in all, bytes of all workers, the
        longest that a worker sampled nothing for, how often one had to load again, and what the worst probe found."""
        began = time.perf_counter()
        compared = self._channel.cfg.compare and len(hosts) > 1
        told = await asyncio.gather(*(self._to(host, compared) for host in hosts))
        off = [one.off for one in told if one.off is not None]
        return {
            "sync/seconds": time.perf_counter() - began,
            "sync/bytes": float(sum(one.bytes for one in told)),
            "sync/paused_s": max(one.paused_s for one in told),
            "sync/loaded_again": float(sum(one.times - 1 for one in told)),
            **({"sync/probe": max(off)} if off else {}),
        }

    async def _to(self, host: Host, compared: bool) -> Delivered:
        """Loads, and samples on where the proofs hold; where one does not, once more."""
        taken, paused_s, wrong = 0, 0.0, ""
        for times in (1, 2):
            taken += await self._load(host, again=times > 1)
            wrong = await self._refuted_by_others(host) if compared else ""
            if not wrong:
                paused_s += await host.ask("resume", deadline_s=self._deadline_s)
                off, wrong = await self._probed(host)
            if not wrong:
                return Delivered(taken, paused_s, off, times)
        raise WorkerError(f"{wrong}; loading them once more did not mend it (its log: {host.log})")

    async def _load(self, host: Host, again: bool) -> int:
        channel = self._channel
        place = (channel.node, channel.run, channel.attempt)
        args = (channel.store.actor, self._snapshot, place, again)
        return await host.ask("receive_from", *args, deadline_s=self._deadline_s)

    async def _refuted_by_others(self, host: Host) -> str:
        """Why this worker does not compute with what the first one computes with; nothing where it does."""
        digests = await host.ask("digests", deadline_s=self._deadline_s)
        if self._first is None or self._first[0] == host.name:
            self._first = host.name, digests
        name, expected = self._first
        wrong = sorted(of for of, digest in expected.items() if digests.get(of) != digest)
        some = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        return (
            f"{host.name} computes with other weights of version {self._snapshot.version} than {name} does in "
            f"{len(wrong)} modules ({some})"
            if wrong
            else ""
        )

    async def _probed(self, host: Host) -> tuple[float | None, str]:
        """How far its logprobs are from the learner's, where that is asked for, and what is wrong where it is too
        far."""
        probe, most = self._snapshot.probe, self._channel.cfg.probe_tolerance
        if probe is None:
            return None, ""
        off = await host.ask("probe", probe, deadline_s=self._deadline_s)
        why = (
            f"{host.name}'s logprobs are not the learner's with weights of version {self._snapshot.version}: {off:.3g} "
            f"nats a token from them on a response of {len(probe.response_ids)}, where weights.probe_tolerance={most:g}"
        )
        return off, "" if off <= most else why

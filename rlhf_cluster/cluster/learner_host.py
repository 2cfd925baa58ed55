"""The learner rank as an actor, which reaches the generation workers itself where weights do not go through the
store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.cluster.hosts import Host, Hosted
from rlhf_cluster.cluster.waits import get
from rlhf_cluster.learner.worker import LearnerWorker
from rlhf_cluster.weights.sender import Rendezvous


@dataclass
class WorkersEngines:
    """Keeps `weights.sender.Engines` over generation workers, each call to all of them at once. `processes`: of each
    worker's engine."""

    workers: Sequence[Host]
    processes: int
    deadline_s: float
    transport: str
    version: int = 0  # that is being sent

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each worker's processes have ranks of their own, where the transport has such."""
        first = init_info.get("rank_offset")
        told = [
            init_info if first is None else init_info | {"rank_offset": first + number * self.processes}
            for number in range(len(self.workers))
        ]
        self._all("open_direct", [(self.transport, one) for one in told])

    def start_weight_update(self) -> None:
        self._all("begin_direct", [()] * len(self.workers))

    def update_weights(self, update_info: Any) -> None:
        self._all("take_direct", [(update_info,)] * len(self.workers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("end_direct", [(self.version,)] * len(self.workers))

    def _all(self, verb: str, args: Sequence[tuple[Any, ...]]) -> None:
        asked = [getattr(worker.actor, verb).remote(*own) for worker, own in zip(self.workers, args, strict=True)]
        for worker, reference in zip(self.workers, asked, strict=True):
            get(reference, worker.call(verb), self.deadline_s)


class LearnerHost(Hosted, LearnerWorker):
    """A learner rank as an actor."""

    def open_direct(self, transport: str, workers: Sequence[Host], processes: int, timeout_s: float) -> None:
        """Meets the engines of these workers. A collective."""
        from rlhf_cluster.weights import gloo  # noqa: F401  loads vLLM, for a quarter of a minute: no port waits for it

        at = Rendezvous(transport, self._ranks.rank, *self.endpoint(), processes * len(workers), timeout_s)
        self._engines = WorkersEngines(workers, processes, timeout_s, transport)
        self.send_by(at, self._engines)

    def send(self, version: int) -> None:
        """The policy to the engines, which sample nothing from then on until they are told to. A collective."""
        self._engines.version = version
        self.sender.send()

"""TensorBoard files of a run, by config: one TensorBoard run per stage, so that metric names stay as they are.

Takes records, gives event files through tensorboardX. A value that is not finite is written as NaN, which TensorBoard
marks. Apart from `metrics.py` because a run without TensorBoard should not import it.
"""

from __future__ import annotations

import math
from pathlib import Path

from tensorboardX import SummaryWriter

from rlhf_cluster.telemetry.metrics import MetricsRecord


class TensorBoardSink:
    """Event files below `directory/<stage>`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[str, SummaryWriter] = {}

    def write(self, record: MetricsRecord) -> None:
        writer = self._writer(record.stage, purge_step=None)
        for name, value in record.metrics.items():
            writer.add_scalar(name, math.nan if value is None else value, record.step, walltime=record.time)
        writer.flush()

    def cut(self, stage: str, after_step: int) -> None:
        """Tells TensorBoard to hide steps beyond `after_step`; event files are never rewritten."""
        if stage in self._writers:
            self._writers.pop(stage).close()
        self._writer(stage, purge_step=after_step + 1)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, stage: str, purge_step: int | None) -> SummaryWriter:
        if stage not in self._writers:
            self._writers[stage] = SummaryWriter(str(self._directory / stage), purge_step=purge_step)
        return self._writers[stage]

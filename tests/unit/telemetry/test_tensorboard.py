from __future__ import annotations

import math
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlhf_cluster.telemetry.metrics import MetricsRecord
from rlhf_cluster.telemetry.tensorboard import TensorBoardSink


def events(directory: Path) -> list[Event]:
    """All events below `directory`, oldest file first. A record: length (8 bytes), crc (4), content, crc (4)."""
    found = []
    for path in sorted(directory.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    return [(v.tag, e.step, v.simple_value) for e in events(directory) for v in e.summary.value]


def test_names_stay_and_stages_are_runs_of_their_own(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(MetricsRecord("rm", 1, 0.0, 10.0, {"rm/loss": 0.5}))
    sink.write(MetricsRecord("ppo", 2, 0.0, 11.0, {"objective/kl": 0.25, "actor/pg_loss": None}))
    sink.close()
    assert scalars(tmp_path / "rm") == [("rm/loss", 1, 0.5)]
    (kl, loss) = scalars(tmp_path / "ppo")
    assert kl == ("objective/kl", 2, 0.25)
    assert loss[:2] == ("actor/pg_loss", 2)
    assert math.isnan(loss[2])


def test_cut_tells_tensorboard_from_which_step_on_to_forget(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.cut("ppo", 5)
    sink.close()
    starts = [e.step for e in events(tmp_path / "ppo") if e.session_log.status == SessionLog.START]
    assert starts == [6]

"""What a person reads when a wait fails: who, in what, the first real error, and where the rest stands."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from rlhf_cluster.cluster.train import cause_of
from rlhf_cluster.cluster.waits import Call, WorkerDied

OUT_OF_MEMORY = OutOfMemoryError(
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: ab) was "
    "22.37GB used / 23.54GB limit (0.950085)\nOOM kill reason: ...\nTop 10 memory users: PID\tMEM(GB)\n1\t8.4"
)
NEARLY_FULL = "its node's memory was nearly full (22.37GB of 23.54GB used), and Ray ended it; lower "


def test_the_first_error_of_a_group_is_told_with_its_log() -> None:
    group = ExceptionGroup("unhandled", [ExceptionGroup("inner", [RuntimeError("no such thing"), ValueError()])])
    error = RayTaskError("sample", "traceback", group)
    failed = Call("generation 1", "sample", Path("/logs/generation-1.log")).failed(error, 60)
    expected = "generation 1 failed in `sample`: RuntimeError: no such thing (its log: /logs/generation-1.log)"
    assert str(failed) == expected


def test_a_deadline_that_passed_is_told_with_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "learner-0.log"
    log.write_text("\n".join(f"line {i}" for i in range(20)))
    said = str(Call("learner 0", "update", log).failed(TimeoutError(), 60))
    assert said.startswith(f"learner 0 did not answer `update` within 60 s; the last lines of {log}:\n  line 8\n")
    assert said.endswith("line 19")


def test_a_death_is_told_apart() -> None:
    failed = Call("reward 0", "score").failed(ActorDiedError(), 60)
    assert isinstance(failed, WorkerDied) and str(failed) == "reward 0 died during `score`"


def test_who_was_ended_for_want_of_memory_says_so_in_one_line() -> None:
    failed = Call("mailbox", "since").failed(OUT_OF_MEMORY, 60)
    assert isinstance(failed, WorkerDied) and str(failed).startswith(f"mailbox died during `since`: {NEARLY_FULL}")
    assert "\n" not in str(failed)


def test_a_stage_tells_what_its_rank_failed_of() -> None:
    """Ray Train puts the reason of each rank under a line of its own, and the last line last."""
    error = ValueError("no such row")
    told = WorkerGroupError(f"[Rank 0 Error Snippet]:\nTraceback (most recent call last):\n  x\n{error!r}", {0: error})
    assert cause_of(told) == "ValueError('no such row')"
    memory = WorkerGroupError(f"[Rank 1 Error Snippet]:\n{OUT_OF_MEMORY}", {1: OUT_OF_MEMORY})
    assert cause_of(memory).startswith(NEARLY_FULL) and "\n" not in cause_of(memory)
    assert cause_of(WorkerGroupError("[Rank 0 Error Snippet]:\nit was killed", {})) == "it was killed"

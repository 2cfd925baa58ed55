"""What a person reads when a wait fails: who, in what, the first real error, and where the rest stands."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import ActorDiedError, RayTaskError

from rlhf_cluster.cluster.waits import Call, WorkerDied


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

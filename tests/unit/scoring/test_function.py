"""Functions in their own process, for real: what they answer, and what hanging, dying and printing costs."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from rlhf_cluster.scoring.function import FunctionCall, FunctionLoadError
from rlhf_cluster.scoring.function_process import FunctionSpec
from rlhf_cluster.scoring.patience import Patience, Patient
from rlhf_cluster.scoring.samples import CallFailed, Sample

SOURCE = """
    import os, time
    from beside import FACTOR

    async def later(samples):
        return [0.0]

    def by_word(samples):
        print("this goes to the log, not into the answer")
        for sample in samples:
            if sample.response == "hang":
                time.sleep(600)
            if sample.response == "die":
                os._exit(7)
            if sample.response == "raise":
                raise KeyError("what?")
        return [FACTOR * len(sample.response) for sample in samples]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("FACTOR = 2\n")
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path


@pytest.fixture
def call(source: Path) -> Iterator[FunctionCall]:
    function = FunctionCall(FunctionSpec("function", f"{source}:by_word"))
    yield function
    function.close()


# One with a process of its own, which holds the pipe open; then it answers, hangs or dies, as it is told.
WITH_CHILD = """
    import os, subprocess, time

    def score(samples):
        with open(PIPE, "w") as pipe:
            subprocess.Popen(["sleep", "600"], stdout=pipe)
            pipe.write("up")
        if samples[0].response == "hang":
            time.sleep(600)
        if samples[0].response == "die":
            os._exit(7)
        return [1.0]
"""
PARENT = """
    import os
    from rlhf_cluster.scoring.function import FunctionCall
    from rlhf_cluster.scoring.function_process import FunctionSpec
    from rlhf_cluster.scoring.samples import Sample

    FunctionCall(FunctionSpec("function", SPEC))([Sample("0", "p", RESPONSE, True)], 600.0)
    os.kill(os.getpid(), 9)
"""


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[int]:
    """Read what the function's child holds open: it ends when that child does."""
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    yield reading
    os.close(reading)


@pytest.fixture
def with_child(tmp_path: Path, pipe: int) -> str:
    path = tmp_path / "with_child.py"
    path.write_text(textwrap.dedent(WITH_CHILD).replace("PIPE", repr(str(tmp_path / "pipe"))))
    return f"{path}:score"


def said(pipe: int) -> bytes:
    """What comes next; nothing once all that could write are gone."""
    assert select.select([pipe], [], [], 60.0)[0], "somebody still holds the pipe"
    return os.read(pipe, 100)


def samples(*responses: str) -> list[Sample]:
    return [Sample(str(i), "p", response, True) for i, response in enumerate(responses)]


def children() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {child.pid for child in found if "function_process" in " ".join(child.cmdline())}


def test_it_answers_and_what_it_prints_is_no_answer(call: FunctionCall) -> None:
    assert call(samples("a", "bcd"), 60.0) == [2, 6]
    assert call(samples("ef"), 60.0) == [4]
    assert len(children()) == 1
    call.close()
    assert not children()


def test_one_that_hangs_is_ended_in_time_and_the_next_call_works(call: FunctionCall) -> None:
    call(samples("a"), 60.0)
    with pytest.raises(CallFailed, match=r"it gave no answer within 0\.3 s"):
        call(samples("hang"), 0.3)
    assert not children()
    assert call(samples("abc"), 60.0) == [6]


def test_one_that_dies_and_one_that_raises_say_so(call: FunctionCall) -> None:
    with pytest.raises(CallFailed, match="its process ended with code 7"):
        call(samples("die"), 60.0)
    with pytest.raises(CallFailed, match="it raised KeyError: 'what"):
        call(samples("raise"), 60.0)
    assert call(samples("abc"), 60.0) == [6]  # raising costs no process


@pytest.mark.parametrize("response", ["hang", "die"])
def test_what_it_started_ends_with_it(with_child: str, pipe: int, response: str) -> None:
    function = FunctionCall(FunctionSpec("function", with_child))
    assert function(samples("go on"), 60.0) == [1.0]
    assert said(pipe) == b"up"
    with pytest.raises(CallFailed):
        function(samples(response), 0.3 if response == "hang" else 60.0)
    while left := said(pipe):
        assert left == b"up"


@pytest.mark.parametrize("response", ["hang", "go on"])
def test_what_it_started_ends_with_the_worker(with_child: str, pipe: int, response: str) -> None:
    program = textwrap.dedent(PARENT).replace("SPEC", repr(with_child)).replace("RESPONSE", repr(response))
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert said(pipe) == b"up"
    if response == "hang":
        parent.kill()
    parent.wait()
    assert said(pipe) == b""


def test_trls_own_reward_is_loaded_and_asked() -> None:
    turns = [{"role": "user", "content": "2+2="}]
    columns = {"prompt": turns, "solution": "$4$"}
    right, wrong = (Sample(text, "2+2=", text, True, columns) for text in ("\\boxed{4}", "\\boxed{5}"))
    with closing(FunctionCall(FunctionSpec("function", "trl.rewards:accuracy_reward"))) as call:
        assert call([right, wrong], 60.0) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{source}:nothing", "has no function nothing"),
        ("{source}:FACTOR", "has no function FACTOR"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("no_name", "'no_name' is neither FILE.py:NAME nor package.module:NAME"),
        ("math:gcd", "its parameters are"),
        ("{source}:later", "it is a coroutine function (async def), which nobody would await; make it a plain one"),
    ],
)
def test_what_cannot_be_loaded_is_said(source: Path, path: str, words: str) -> None:
    function = FunctionCall(FunctionSpec("function", path.format(source=source)))
    with pytest.raises(FunctionLoadError, match=re.escape(words)):
        function.start()
    assert not children()


def test_a_file_that_raises_when_it_is_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1/0\n")
    with pytest.raises(FunctionLoadError, match="it raised ZeroDivisionError"):
        FunctionCall(FunctionSpec("function", f"{tmp_path / 'broken.py'}:f")).start()


def test_a_verifier_runs_there_too() -> None:
    call = FunctionCall(FunctionSpec("math", column="answer"))
    assert call([Sample("0", "p", "It is 4.", True, {"answer": "4"})], 60.0) == [1.0]
    call.close()


def test_only_the_sample_whose_answer_is_nothing_fails() -> None:
    good, bad = (Sample(answer, "p", "It is 4.", True, {"answer": answer}) for answer in ("4", "?"))
    patience = Patience(
        deadline_s=60.0,
        retries=0,
        backoff_s=0.0,
        breaker_failures=9,
        breaker_s=9.0,
        batch_size=2,
        concurrency=1,
        budget_s=300.0,
    )
    with closing(FunctionCall(FunctionSpec("math", column="answer"))) as call:
        found = Patient(call, patience)([good, bad])
    assert list(found.scores) == [1.0, 0.0]
    assert list(found.failures) == ["", "it raised ValueError: the answer '?' holds nothing that math-verify reads"]


def test_nobody_closes_it_and_its_process_ends_all_the_same(source: Path) -> None:
    call = FunctionCall(FunctionSpec("function", f"{source}:by_word"))
    call.start()
    assert children()
    del call
    assert not children()

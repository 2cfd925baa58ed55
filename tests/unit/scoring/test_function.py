"""Functions in their own process, for real: what they answer, and what hanging, dying and printing costs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_cluster.scoring.function import FunctionCall, FunctionLoadError
from rlhf_cluster.scoring.function_process import FunctionSpec
from rlhf_cluster.scoring.samples import CallFailed, Sample

SOURCE = """
    import os, time
    from beside import FACTOR

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


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{source}:nothing", "has no function nothing"),
        ("{source}:FACTOR", "has no function FACTOR"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("no_name", "'no_name' is neither FILE.py:NAME nor package.module:NAME"),
        ("math:gcd", "its parameters are"),
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


def test_nobody_closes_it_and_its_process_ends_all_the_same(source: Path) -> None:
    call = FunctionCall(FunctionSpec("function", f"{source}:by_word"))
    call.start()
    assert children()
    del call
    assert not children()

"""Rules that decide: what is right, what is not, and what is no rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf_cluster.scoring.samples import Sample
from rlhf_cluster.scoring.verifiers import make_verifier, read_answer


def judged(kind: str, responses: list[str], answer: str = "", pattern: str = "", schema: str = "") -> list[float]:
    verify = make_verifier(kind, "answer", pattern, schema)
    return verify([Sample(str(i), "p", text, True, {"answer": answer}) for i, text in enumerate(responses)])


def test_exact_match_minds_no_white_space_around() -> None:
    assert judged("exact", ["42", " 42\n", "4 2", "The answer is 42", ""], "42") == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_mathematics_is_equality_of_values() -> None:
    responses = ["So it is $\\frac{1}{2}$.", "0.5", "The answer is 1/2", "$\\frac{2}{3}$", "no idea"]
    assert judged("math", responses, "1/2") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert judged("math", ["#### 42", "\\boxed{42}", "41"], "42") == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("42", "42", "41"),
        ("-7", "$-7$", "7"),
        ("0.25", "$\\frac14$", "0.2"),
        ("1/2", "0.5", "2"),
        ("1,234", "1234", "1"),
        ("50%", "$50\\%$", "5"),
        ("50\\%", "50%", "5"),
        ("$\\frac12$", "0.5", "12"),
        ("\\boxed{3}", "3", "4"),
        ("2\\pi", "$2\\pi$", "2"),
        ("10\\sqrt{2}", "\\boxed{10\\sqrt2}", "10"),
        ("\\sqrt{2}", "$\\sqrt{2}$", "2"),
        ("\\frac{\\sqrt3}{2}", "$\\frac{\\sqrt{3}}{2}$", "2"),
        ("3\\frac{1}{2}", "3.5", "0.5"),
        ("0.\\overline{3}", "$0.\\overline{3}$", "0"),
        ("x^2+1", "$1 + x^2$", "$x^2$"),
        ("x^2 + xy", "$x(x+y)$", "2"),
        ("(1,2)", "$(1, 2)$", "2"),
        ("4,5,6", "$4, 5, 6$", "4.5"),
        ("2**10", "1024", "2"),
        ("18.", "18", "19"),
        ("72 clips", "72", "71"),
        ("The answer is 4.", "4", "5"),
        ("48/2 = <<48/2=24>>24 clips in May.\n#### 72", "72", "24"),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", "\\boxed{\\text{Briana}}"),
        ("Paris", "\\boxed{Paris}", "\\boxed{London}"),
    ],
)
def test_an_answer_needs_no_dollars(answer: str, right: str, wrong: str) -> None:
    assert judged("math", [right, wrong], answer) == [1.0, 0.0]


@pytest.mark.parametrize("answer", ["", " ", "?", "}{"])
def test_an_answer_that_is_nothing_is_no_score_of_0(answer: str) -> None:
    with pytest.raises(ValueError, match=f"the answer {re.escape(repr(answer))} holds nothing that math-verify reads"):
        read_answer(answer)
    with pytest.raises(ValueError, match="holds nothing"):
        judged("math", ["4"], answer)


def test_a_pattern_is_found_anywhere_also_over_lines() -> None:
    assert judged("regex", ["<think>\na\n</think> b", "b"], pattern=r"<think>.*</think>") == [1.0, 0.0]


def test_a_schema_takes_json_and_nothing_around_it(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}))
    responses = ['{"age": 3}', '{"age": "3"}', "{}", '{"age": 3} there', ""]
    assert judged("json_schema", responses, schema=str(path)) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_what_is_no_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="unterminated"):
        make_verifier("regex", "", "(", "")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "objekt"}')
    with pytest.raises(Exception, match="objekt"):
        make_verifier("json_schema", "", "", str(path))

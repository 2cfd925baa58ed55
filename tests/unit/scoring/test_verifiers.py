"""Rules that decide: what is right, what is not, and what is no rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cluster.scoring.samples import Sample
from rlhf_cluster.scoring.verifiers import make_verifier


def judged(kind: str, responses: list[str], answer: str = "", pattern: str = "", schema: str = "") -> list[float]:
    verify = make_verifier(kind, "answer", pattern, schema)
    return verify([Sample(str(i), "p", text, True, {"answer": answer}) for i, text in enumerate(responses)])


def test_exact_match_minds_no_white_space_around() -> None:
    assert judged("exact", ["42", " 42\n", "4 2", "The answer is 42", ""], "42") == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_mathematics_is_equality_of_values() -> None:
    responses = ["So it is $\\frac{1}{2}$.", "0.5", "The answer is 1/2", "$\\frac{2}{3}$", "no idea"]
    assert judged("math", responses, "1/2") == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert judged("math", ["#### 42", "\\boxed{42}", "41"], "42") == [1.0, 1.0, 0.0]


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

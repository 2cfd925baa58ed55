"""Rewards that a rule decides: mathematics, exact match, a pattern, a JSON schema. 1 for a right response, else 0.

They run like a user's functions, in a process of their own: a pattern may backtrack and an expression expand for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_cluster.scoring.samples import Sample

WORD = re.compile(r"(?<!\S)[A-Za-z]{4,}(?![^\s.,:;!?])")  # one that stands alone: of prose, hardly a product


def exact(samples: Sequence[Sample], column: str) -> list[float]:
    """The response is the answer, but for the white space around either."""
    return [float(sample.response.strip() == str(sample.columns[column]).strip()) for sample in samples]


def mathematics(samples: Sequence[Sample], column: str) -> list[float]:
    """The last expression of the response equals the answer's, as `math-verify` sees it: 1/2 is 0.5."""
    from math_verify import parse, verify

    return [float(verify(read_answer(str(sample.columns[column])), parse(sample.response))) for sample in samples]


def read_answer(text: str) -> list[Any]:
    """An answer as `math-verify` has it: expressions, and the text of them. Raises ValueError where it reads nothing.

    It takes LaTeX for LaTeX in $...$ or a box alone, and elsewhere reads the 2 of 2\\pi, so an answer is put in a box.
    Two kinds are not: in a box the letters of prose (72 clips) are factors, and 50%, 2**10 or 18. are no mathematics.
    """
    from math_verify import parse

    bare = text.replace("\\%", "%")
    boxed = parse(f"\\boxed{{{bare}}}")
    if "\\" not in bare and WORD.search(bare):
        found = parse(bare) or boxed
    elif re.search(r"[\\A-Za-z]", bare) or any(not isinstance(one, str) for one in boxed):
        found = boxed
    else:
        found = parse(bare)
    if not found:
        raise ValueError(f"the answer {text!r} holds nothing that math-verify reads")
    return found


def matches(samples: Sequence[Sample], pattern: str) -> list[float]:
    """The pattern is found somewhere in the response (Python's `re`; . also matches line ends)."""
    compiled = re.compile(pattern, re.DOTALL)
    return [float(compiled.search(sample.response) is not None) for sample in samples]


def fits_schema(samples: Sequence[Sample], schema: Mapping[str, Any]) -> list[float]:
    """The response, all of it, is JSON that the schema allows."""
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema)

    def fits(text: str) -> bool:
        try:
            return validator.is_valid(json.loads(text))
        except json.JSONDecodeError:
            return False

    return [float(fits(sample.response)) for sample in samples]


def make_verifier(kind: str, column: str, pattern: str, schema: str) -> Callable[[Sequence[Sample]], list[float]]:
    """By `kind` of a reward's part. Raises ValueError where the pattern or the schema is none."""
    if kind == "regex":
        re.compile(pattern)
        return partial(matches, pattern=pattern)
    if kind == "json_schema":
        from jsonschema.validators import validator_for

        parsed = json.loads(Path(schema).read_text())
        validator_for(parsed).check_schema(parsed)
        return partial(fits_schema, schema=parsed)
    return partial({"exact": exact, "math": mathematics}[kind], column=column)

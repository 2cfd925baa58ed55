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


def exact(samples: Sequence[Sample], column: str) -> list[float]:
    """The response is the answer, but for the white space around either."""
    return [float(sample.response.strip() == str(sample.columns[column]).strip()) for sample in samples]


def mathematics(samples: Sequence[Sample], column: str) -> list[float]:
    """The last expression of the response equals the answer's, as `math-verify` sees it: 1/2 is 0.5."""
    from math_verify import parse, verify

    return [float(verify(parse(str(sample.columns[column])), parse(sample.response))) for sample in samples]


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

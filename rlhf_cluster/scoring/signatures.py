"""Reward functions as people have them: four calling conventions, told apart by the names of their parameters.

    ours       f(samples) -> list[float]                                            samples: Sequence[Sample]
    TRL        f(prompts, completions, **columns) -> list[float | None]
    OpenRLHF   f(queries, prompts, labels, **_) -> tensor | {"rewards": tensor, ...}   queries: prompt and response
    verl       f(data_source, solution_str, ground_truth, extra_info=None) -> float | {"score": float, ...}

TRL's functions are given messages where the row's prompt was given as messages, the response as one of the assistant's,
and text as it was given where it was text. OpenRLHF's are given what the model read and wrote, special tokens included.
What a function says beside its score is not kept.

Columns are the prompt row's own. Where a convention asks for one label, that is the column named in the config, or the
place where verl's data sets have it, `reward_model.ground_truth`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_cluster.scoring.samples import MESSAGES, Answer, Sample

TRLS_OWN = {"completion_ids", "trainer_state", "log_extra", "log_metric"}  # of its trainer, not of a sample

Adapted = Callable[[Sequence[Sample]], Sequence[Answer]]


class NoNumber(TypeError):
    """A function answered with what is no score; it raised nothing itself."""


class SignatureError(ValueError):
    """A function that is called in none of the known ways."""


def adapt(function: Callable[..., Any], label: str) -> Adapted:
    """`function` as one that takes samples; `label` names the column with the answer."""
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise SignatureError("it is a coroutine function (async def), which nobody would await; make it a plain one")
    parameters = inspect.signature(function).parameters
    names = set(parameters)
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "completions" in names:
        if unknown := sorted(name for name in names & TRLS_OWN if parameters[name].default is inspect.Parameter.empty):
            raise SignatureError(f"it asks for {', '.join(unknown)}, which only TRL's trainer has; give them defaults")
        return lambda samples: _trl(function, samples, names, everything)
    if {"queries", "prompts", "labels"} <= names:
        return lambda samples: _openrlhf(function, samples, label)
    if {"solution_str", "ground_truth"} <= names:
        return lambda samples: [_verl(function, sample, label, names, everything) for sample in samples]
    ways = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters.values() if p.default is p.empty]
    if [p.kind in ways for p in required if p.kind is not p.VAR_KEYWORD] == [True]:
        return lambda samples: numbers(function(samples))
    raise SignatureError(
        f"its parameters are ({', '.join(parameters)}); known are (samples), (prompts, completions, **columns), "
        "(queries, prompts, labels) and (data_source, solution_str, ground_truth, extra_info)"
    )


def numbers(answers: Any) -> list[Answer]:
    """A list, array or tensor of numbers as a plain list."""
    if isinstance(answers, str | Mapping) or not hasattr(answers, "__iter__"):
        raise NoNumber(f"it gave {_short(answers)}; a list of numbers, one for each sample, is wanted")
    flat = answers.flatten().tolist() if hasattr(answers, "flatten") else list(answers)
    return [None if answer is None else _number(answer) for answer in flat]


def _number(answer: Any) -> float:
    try:
        return float(answer)
    except (TypeError, ValueError, OverflowError) as error:
        raise NoNumber(f"it gave {_short(answer)} for a sample; a number is wanted") from error


def _short(answer: Any) -> str:
    text = repr(answer)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _trl(
    function: Callable[..., Any], samples: Sequence[Sample], names: set[str], everything: bool
) -> Sequence[Answer]:
    given: dict[str, list[Any]] = {
        "prompts": [sample.columns.get(MESSAGES) or sample.given for sample in samples],
        "completions": [_completion(sample) for sample in samples],
    }
    for column in dict.fromkeys(name for sample in samples for name in sample.columns if name != MESSAGES):
        given[column] = [sample.columns.get(column) for sample in samples]
    return numbers(function(**{name: column for name, column in given.items() if everything or name in names}))


def _completion(sample: Sample) -> Any:
    return [{"role": "assistant", "content": sample.response}] if sample.columns.get(MESSAGES) else sample.response


def _openrlhf(function: Callable[..., Any], samples: Sequence[Sample], label: str) -> Sequence[Answer]:
    answer = function(
        queries=["".join(sample.raw) for sample in samples],
        prompts=[sample.raw[0] for sample in samples],
        labels=[_truth(sample, label) for sample in samples],
    )
    return numbers(answer["rewards"] if isinstance(answer, Mapping) else answer)


def _verl(function: Callable[..., Any], sample: Sample, label: str, names: set[str], everything: bool) -> Answer:
    given = {
        "data_source": sample.columns.get("data_source", ""),
        "solution_str": sample.response,
        "ground_truth": _truth(sample, label),
        "extra_info": sample.columns.get("extra_info"),
    }
    answer = function(**{name: value for name, value in given.items() if everything or name in names})
    return _number(answer["score"] if isinstance(answer, Mapping) else answer)


def _truth(sample: Sample, label: str) -> Any:
    verls = sample.columns.get("reward_model")
    if label not in sample.columns and isinstance(verls, Mapping):
        return verls.get("ground_truth")
    return sample.columns.get(label)

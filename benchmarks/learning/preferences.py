"""What does a reward model of 135M parameters learn from people's preferences? Trained on Anthropic's hh-rlhf
(harmless), judged on conversations that were held out, with the obvious things tried: learning rate, epochs, longer
rows, a start from SFT, rankings of OpenAssistant added.

    python benchmarks/learning/preferences.py --hh FILE --oasst FILE [--seeds 0 1 2] [--tries 0] [--out DIR]

A seed splits anew, by conversation. Seeds in `--tries` run every variant; the others run the recipe and the variant
that was best there, and the table has the means of these alone where there are any: what is chosen by looking looks
better than it is. (A seed's held-out conversations may be another's too.) Every run is `rlhf-cluster run`, as a person
types it; what is finished is not run again. Leaves `preferences.json` beside this file, and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
from transformers import PreTrainedTokenizerBase

from rlhf_cluster.config import DataConfig, ModelConfig
from rlhf_cluster.data.rows import ComparisonRow
from rlhf_cluster.data.sources import load_corpus
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.rm import RMEvaluation, read_evaluation

HERE = Path(__file__).parent
# Measured on 500 other pairs of that data (standard error 0.022).
FLOORS = {"the less profane response": 0.535, "TF-IDF and Bradley-Terry": 0.622}
CONTEXT, LONGER = 320, 512  # tokens of prompt and response
RECIPE = "recipe: lr 2e-5, 1 epoch"


@dataclass(frozen=True)
class Variant:
    """What one run is told, and which rows it learns from."""

    options: list[str]
    rows: str = "hh"
    context: int = CONTEXT


RM = arms.options(stages="[rm]")
VARIANTS = {
    RECIPE: Variant(RM),
    "lr 5e-5": Variant([*RM, *arms.options(rm__optimizer__lr=5e-5)]),
    "lr 1e-4": Variant([*RM, *arms.options(rm__optimizer__lr=1e-4)]),
    "2 epochs": Variant([*RM, *arms.options(rm__epochs=2)]),
    f"rows of up to {LONGER} tokens": Variant(RM, "longer", LONGER),
    "from SFT on the preferred": Variant(arms.options(stages="[sft,rm]", data__max_demonstrations=0)),
    "with OpenAssistant's rankings": Variant(RM, "pooled"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward model on people's preferences.")
    parser.add_argument("--hh", type=Path, required=True, help="hh-rlhf, jsonl(.gz)")
    parser.add_argument("--oasst", type=Path, required=True, help="OpenAssistant's trees, jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tries", type=int, nargs="+", default=[0], help="seeds that run every variant")
    parser.add_argument("--out", type=Path, default=Path("runs/learning/preferences"))
    args = parser.parse_args()
    found: dict[str, dict[int, RMEvaluation]] = {name: {} for name in VARIANTS}

    def judge(seed: int, names: Iterable[str]) -> None:
        directory = args.out / f"seed-{seed}"
        write_rows(directory / "data", args.hh, args.oasst, seed)
        for name in names:
            found[name][seed] = evaluated(directory, name, seed)
            print(f"seed {seed}, {name}: {found[name][seed]}", flush=True)

    for seed in args.tries:
        judge(seed, VARIANTS)
    chosen = best(found)
    for seed in [seed for seed in args.seeds if seed not in args.tries]:
        judge(seed, dict.fromkeys((RECIPE, chosen)))
    print(table(found, args.tries))
    told = {name: {seed: facts(one) for seed, one in of_seeds.items()} for name, of_seeds in found.items()}
    (HERE / "preferences.json").write_text(json.dumps({"floors": FLOORS, "variants": told}, indent=1) + "\n")


def evaluated(directory: Path, name: str, seed: int) -> RMEvaluation:
    variant, data = VARIANTS[name], directory / "data"
    options = [
        "recipe=hh",
        "data=files",
        f"seed={seed}",
        f"model.context={variant.context}",
        f"data.max_prompt_tokens={variant.context - 1}",  # the rows were chosen by their whole length
        "generation.max_response_tokens=1",
        f"data.comparisons={data / f'{variant.rows}.jsonl'}",
        f"data.heldout_comparisons={data / 'heldout.jsonl'}",
        f"data.demonstrations={data / 'demonstrations.jsonl'}",
        *variant.options,
    ]
    return read_evaluation(arms.run(arms.place(directory, name), options) / "stages" / "rm" / "reward_model")


def best(found: dict[str, dict[int, RMEvaluation]]) -> str:
    """The variant of the highest mean accuracy so far."""
    return max(found, key=lambda name: arms.mean_and_error([one.accuracy for one in found[name].values()])[0])


def write_rows(directory: Path, hh: Path, oasst: Path, seed: int) -> None:
    """The files of a seed. All variants are judged by the same pairs, those that fit the shorter context."""
    if (directory / "heldout.jsonl").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(prepare_model(ModelConfig("smollm2_135m")))
    own = load_corpus(DataConfig(source="hh", path=str(hh), heldout_prompts=0), seed)
    other = load_corpus(DataConfig(source="oasst", path=str(oasst), heldout_prompts=0, heldout_fraction=0.0), seed)
    rows = fitting(own.comparisons, tokenizer, CONTEXT)
    write(directory / "hh.jsonl", map(as_json, rows))
    write(directory / "longer.jsonl", map(as_json, fitting(own.comparisons, tokenizer, LONGER)))
    write(directory / "pooled.jsonl", map(as_json, [*rows, *fitting(other.comparisons, tokenizer, CONTEXT)]))
    write(directory / "demonstrations.jsonl", map(preferred, rows))
    write(directory / "heldout.jsonl", map(as_json, fitting(own.heldout_comparisons, tokenizer, CONTEXT)))


def fitting(rows: Iterable[ComparisonRow], tokenizer: PreTrainedTokenizerBase, context: int) -> list[ComparisonRow]:
    """Those whose prompt and longest response, EOS included, are `context` tokens at most."""
    return [row for row in rows if longest(row, tokenizer) <= context]


def longest(row: ComparisonRow, tokenizer: PreTrainedTokenizerBase) -> int:
    prompt = tokenizer.apply_chat_template(turns(row), add_generation_prompt=True, tokenize=False)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, *row.responses)]
    return lengths[0] + max(lengths[1:]) + 1


def turns(row: ComparisonRow) -> list[dict[str, str]]:
    return [dataclasses.asdict(message) for message in row.prompt.messages]


def as_json(row: ComparisonRow) -> dict[str, Any]:
    ranked = [{"completion": text, "rank": rank} for text, rank in zip(row.responses, row.ranks, strict=True)]
    return {"prompt": turns(row), "completions": ranked}


def preferred(row: ComparisonRow) -> dict[str, Any]:
    """The response that people preferred, as a demonstration."""
    return {"prompt": turns(row), "completion": row.responses[row.ranks.index(min(row.ranks))]}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts(one: RMEvaluation) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(one).items() if name != "margins"}


def table(found: dict[str, dict[int, RMEvaluation]], tries: Sequence[int]) -> str:
    """A row for each variant: means over its seeds, without `tries` where it has others; errors are those over prompts,
    of each seed."""
    lines = [
        "| reward model | seeds | accuracy | its standard error by seed | length-controlled | shorter | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_seeds in found.items():
        fresh = [seed for seed in of_seeds if seed not in tries]
        seeds = fresh or list(of_seeds)
        every = [of_seeds[seed] for seed in seeds]
        cells = [
            ", ".join(map(str, seeds)),
            " ".join([f"**{mean([one.accuracy for one in every])}**", by_seed(one.accuracy for one in every)]),
            ", ".join(f"{one.accuracy_se:.3f}" for one in every),
            mean([one.length_controlled_accuracy for one in every]),
            mean([one.shorter_accuracy for one in every]),
            ", ".join(str(one.pairs) for one in every),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name} (floor, other pairs) | | {floor:.3f} | | | | |" for name, floor in FLOORS.items()]
    return "\n".join(lines)


def mean(values: Sequence[float]) -> str:
    return f"{arms.mean_and_error(values)[0]:.3f}"


def by_seed(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    main()

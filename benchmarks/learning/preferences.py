"""What does a reward model of 135M parameters learn from people's preferences? Trained on Anthropic's hh-rlhf
(harmless), judged on conversations that were held out, with the obvious things tried: learning rate, epochs, longer
rows, a start from SFT, rankings of OpenAssistant added; and with labels by chance, as a control that must learn
nothing. And on OpenAssistant's rankings alone, as its recipe has it.

    python benchmarks/learning/preferences.py --hh FILE --oasst FILE [--seeds 0 1 2] [--tries 0] [--threads 2]
        [--variants NAME ...] [--out DIR]

A seed splits anew, by conversation. Seeds in `--tries` run every variant; the others run the recipe, the control and
the variant that was best there, and the table has the means of these alone where there are any: what is chosen by
looking looks better than it is. (A seed's held-out conversations may be another's too.) Beside them stands what words
alone give, on the same pairs (`tfidf.py`; of OpenAssistant on all, while its recipe leaves out those that are too
long). Every run is `rlhf-cluster run`, as a person types it, of 20 minutes and more on two cores; what is finished, or
has its figures in `preferences.json` already, is not run again. Writes that file after every run, draws
`preferences.png`, and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms
import matplotlib.pyplot as plt
import tfidf
from transformers import PreTrainedTokenizerBase

from rlhf_cluster.config import DataConfig, ModelConfig
from rlhf_cluster.data.rows import ComparisonRow
from rlhf_cluster.data.sources import load_corpus
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.models.tokenizer import load_tokenizer
from rlhf_cluster.rm import RMEvaluation, read_evaluation

HERE = Path(__file__).parent
RESULTS = HERE / "preferences.json"
WORDS = "TF-IDF and Bradley-Terry"
CONTEXT, LONGER = 320, 512  # tokens of prompt and response
RECIPE, CONTROL = "recipe: lr 2e-5, 1 epoch", "control: labels by chance"


@dataclass(frozen=True)
class Variant:
    """What one run is told, and which rows it learns from."""

    options: list[str]
    rows: str = "hh"
    context: int = CONTEXT


OASST = "OpenAssistant alone: its recipe"
RM = arms.options(stages="[rm]")
VARIANTS = {
    RECIPE: Variant(RM),
    CONTROL: Variant(RM, "chance"),
    "lr 5e-5": Variant([*RM, *arms.options(rm__optimizer__lr=5e-5)]),
    "lr 1e-4": Variant([*RM, *arms.options(rm__optimizer__lr=1e-4)]),
    "2 epochs": Variant([*RM, *arms.options(rm__epochs=2)]),
    f"rows of up to {LONGER} tokens": Variant(RM, "longer", LONGER),
    "from SFT on the preferred": Variant(arms.options(stages="[sft,rm]", data__max_demonstrations=0)),
    "with OpenAssistant's rankings": Variant(RM, "pooled"),
}


@dataclass
class Found:
    """Figures by variant and seed, and the share of the pairs that words alone get right, by data set and seed."""

    variants: dict[str, dict[int, RMEvaluation]]
    words: dict[str, dict[int, float]]

    @classmethod
    def read(cls) -> Found:
        """What earlier runs wrote."""
        told = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"variants": {}, "words": {}}
        variants = {
            name: {int(seed): RMEvaluation(**one, margins=[]) for seed, one in told["variants"].get(name, {}).items()}
            for name in [*VARIANTS, OASST]
        }
        words = {name: {int(s): share for s, share in told["words"].get(name, {}).items()} for name in ("hh", "oasst")}
        return cls(variants, words)

    def write(self) -> None:
        variants = {name: {seed: facts(one) for seed, one in seeds.items()} for name, seeds in self.variants.items()}
        RESULTS.write_text(json.dumps({"words": self.words, "variants": variants}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward model on people's preferences.")
    parser.add_argument("--hh", type=Path, required=True, help="hh-rlhf, jsonl(.gz)")
    parser.add_argument("--oasst", type=Path, required=True, help="OpenAssistant's trees, jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tries", type=int, nargs="+", default=[0], help="seeds that run every variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="of the tries, these alone")
    parser.add_argument("--threads", type=int, default=2, help="of a run")
    parser.add_argument("--out", type=Path, default=Path("runs/learning/preferences"))
    args = parser.parse_args()
    found = Found.read()

    def judge(seed: int, names: Iterable[str]) -> None:
        directory = args.out / f"seed-{seed}"
        found.words["hh"][seed] = write_rows(directory / "data", args.hh, args.oasst, seed)
        print(f"seed {seed}, {WORDS}: {found.words['hh'][seed]:.3f}", flush=True)
        for name in names:
            run_once(directory, name, seed, of_hh(VARIANTS[name], directory / "data"))

    def judge_oasst(seed: int) -> None:
        own = load_corpus(DataConfig(source="oasst", path=str(args.oasst), heldout_prompts=32), seed)
        found.words["oasst"][seed] = tfidf.accuracy(own.comparisons, own.heldout_comparisons, seed)
        print(f"seed {seed}, OpenAssistant, {WORDS}: {found.words['oasst'][seed]:.3f}", flush=True)
        run_once(args.out / f"seed-{seed}", OASST, seed, ["recipe=oasst", f"data.path={args.oasst}", *RM])

    def run_once(directory: Path, name: str, seed: int, options: Sequence[str]) -> None:
        of_seeds = found.variants[name]
        if seed not in of_seeds:
            threads = [f"{stage}.resources.threads={args.threads}" for stage in ("sft", "rm")]
            run = arms.run(arms.place(directory, name), [*options, f"seed={seed}", *threads])
            of_seeds[seed] = read_evaluation(run / "stages" / "rm" / "reward_model")
        found.write()
        print(f"seed {seed}, {name}: {of_seeds[seed]}", flush=True)

    if args.variants:
        for seed in args.tries:
            judge(seed, args.variants)
        draw(found)
        return
    for seed in args.seeds:
        judge_oasst(seed)
    for seed in args.tries:
        judge(seed, VARIANTS)
    chosen = best(found.variants, args.tries)
    for seed in [seed for seed in args.seeds if seed not in args.tries]:
        judge(seed, dict.fromkeys((RECIPE, CONTROL, chosen)))
    draw(found)
    print(table(found, args.tries))


def of_hh(variant: Variant, data: Path) -> list[str]:
    """What a run on the rows that `write_rows` left in `data` is told."""
    return [
        "recipe=hh",
        "data=files",
        f"model.context={variant.context}",
        f"data.max_prompt_tokens={variant.context - 1}",  # the rows were chosen by their whole length
        "generation.max_response_tokens=1",
        f"data.comparisons={data / f'{variant.rows}.jsonl'}",
        f"data.heldout_comparisons={data / 'heldout.jsonl'}",
        f"data.demonstrations={data / 'demonstrations.jsonl'}",
        *variant.options,
    ]


def best(variants: dict[str, dict[int, RMEvaluation]], tries: Sequence[int]) -> str:
    """The variant of the highest mean accuracy over the seeds that ran all."""
    tried = [name for name in VARIANTS if name != CONTROL]
    return max(tried, key=lambda name: arms.mean_and_error([variants[name][seed].accuracy for seed in tries])[0])


def write_rows(directory: Path, hh: Path, oasst: Path, seed: int) -> float:
    """The files of a seed; returns what words alone get right. All variants are judged by the same pairs, those that
    fit the shorter context."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(prepare_model(ModelConfig("smollm2_135m")))
    own = load_corpus(DataConfig(source="hh", path=str(hh), heldout_prompts=0), seed)
    other = load_corpus(DataConfig(source="oasst", path=str(oasst), heldout_prompts=0, heldout_fraction=0.0), seed)
    rows, heldout = (fitting(one, tokenizer, CONTEXT) for one in (own.comparisons, own.heldout_comparisons))
    write(directory / "hh.jsonl", map(as_json, rows))
    write(directory / "chance.jsonl", map(as_json, by_chance(rows, seed)))
    write(directory / "longer.jsonl", map(as_json, fitting(own.comparisons, tokenizer, LONGER)))
    write(directory / "pooled.jsonl", map(as_json, [*rows, *fitting(other.comparisons, tokenizer, CONTEXT)]))
    write(directory / "demonstrations.jsonl", map(preferred, rows))
    write(directory / "heldout.jsonl", map(as_json, heldout))
    return tfidf.accuracy(rows, heldout, seed)


def fitting(rows: Iterable[ComparisonRow], tokenizer: PreTrainedTokenizerBase, context: int) -> list[ComparisonRow]:
    """Those whose prompt and longest response, EOS included, are `context` tokens at most."""
    return [row for row in rows if longest(row, tokenizer) <= context]


def longest(row: ComparisonRow, tokenizer: PreTrainedTokenizerBase) -> int:
    prompt = tokenizer.apply_chat_template(turns(row), add_generation_prompt=True, tokenize=False)
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, *row.responses)]
    return lengths[0] + max(lengths[1:]) + 1


def by_chance(rows: Iterable[ComparisonRow], seed: int) -> Iterator[ComparisonRow]:
    """The same responses, preferred by the toss of a coin."""
    rng = random.Random(seed)
    for row in rows:
        yield dataclasses.replace(row, ranks=tuple(rng.sample(row.ranks, len(row.ranks))))


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


def table(found: Found, tries: Sequence[int]) -> str:
    """A row for each variant: means over its seeds, without `tries` where it has others; errors are those over prompts,
    of each seed. Then words alone, over all seeds; of OpenAssistant likewise."""
    lines = [
        "| reward model | seeds | accuracy | its standard error by seed | length-controlled | shorter | pairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of_seeds in found.variants.items():
        fresh = [seed for seed in of_seeds if seed not in tries or name == OASST]
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
    for data_set, words in found.words.items():
        shares = list(words.values())
        told = [", ".join(map(str, words)), f"{mean(shares)} {by_seed(shares)}", "", "", "", ""]
        lines.append(f"| {WORDS}, {data_set} | {' | '.join(told)} |")
    return "\n".join(lines)


def draw(found: Found) -> None:
    """Accuracy with its standard error over prompts (dot) and length-controlled accuracy (cross), a row for each seed
    of each variant; what words alone get right of the same pairs as a tick."""
    ran = [(name, seed, one) for name, of_seeds in found.variants.items() for seed, one in sorted(of_seeds.items())]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(ran)), constrained_layout=True)
    places = range(len(ran))
    words = [found.words["oasst" if name == OASST else "hh"][seed] for name, seed, _ in ran]
    accuracy, error = zip(*((one.accuracy, one.accuracy_se) for _, _, one in ran), strict=True)
    axes.errorbar(accuracy, places, xerr=error, fmt="o", label="accuracy")
    axes.plot([one.length_controlled_accuracy for _, _, one in ran], places, "x", label="length-controlled")
    axes.plot(words, places, "|", color="0.3", markersize=12, label=WORDS)
    axes.axvline(0.5, color="0.6", linestyle="--", linewidth=1)
    axes.set_yticks(places, [f"{name}, seed {seed}" for name, seed, _ in ran])
    axes.invert_yaxis()
    axes.set(xlabel="held-out pairs ordered as people did", title="Reward models on people's preferences")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(HERE / "preferences.png", dpi=130)


def mean(values: Sequence[float]) -> str:
    return f"{arms.mean_and_error(values)[0]:.3f}"


def by_seed(values: Iterable[float]) -> str:
    return f"({', '.join(f'{value:.3f}' for value in values)})"


if __name__ == "__main__":
    main()

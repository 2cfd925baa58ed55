"""Does it learn? Sums of two numbers below 100, held-out sums only: SFT on demonstrations of which 30 % are wrong, then
PPO with a reward model, PPO with the true reward, GRPO with the true reward, and PPO with a random reward as a control.

    python benchmarks/learning/arithmetic.py [--seeds 0 1 2] [--out DIR]

Beside exact match stand two measures that no reward sees: how many answers are numbers at all, and how far these are
from the sum. Every run is `rlhf-cluster run`, as a person types it; what is finished is not run again, nor a seed that
has its figures in `arithmetic.json`. Writes that file after every seed, leaves `arithmetic.png` beside it and a few
samples in `samples/`, and prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import arms
import matplotlib.pyplot as plt
import responses
import small
import sums

HERE = Path(__file__).parent
RESULTS = HERE / "arithmetic.json"
WRONG, DEMONSTRATIONS = 0.3, 9600

TASK = arms.options(
    model__context=sums.CONTEXT,
    data__max_prompt_tokens=8,
    generation__max_response_tokens=6,
    generation__flush_ms=200,
    evaluation__gold="exact",
)
SFT = arms.options(
    name="sft",
    stages="[sft]",
    sft__epochs=20,
    sft__batch_size=32,
    sft__packing="false",
    sft__optimizer__lr=1e-3,
)
PPO = arms.options(
    stages="[ppo]",
    ppo__steps=120,
    evaluation__every=20,
    ppo__batch_size=256,
    ppo__minibatch_size=128,
    learner__policy__lr=1e-4,
    learner__policy__warmup_steps=3,
    learner__critic__lr=3e-4,
    learner__critic__warmup_steps=0,
)
RM = arms.options(
    name="rm",
    stages="[rm]",
    rm__ranking__labeler="exact",
    rm__ranking__prompts=8000,
    rm__ranking__responses=4,
    rm__ranking__tie_margin=0.0,
    rm__epochs=40,
    rm__batch_size=32,
    rm__optimizer__lr=3e-4,
    rm__engine__tokens_per_micro_batch=8192,
)
PENALTY = arms.options(ppo__kl__coef=0.02)
OF_A_MODEL = arms.options(ppo__score_norm="true", ppo__kl__coef=0.1)  # its scores have a scale of their own
MODELLED = "PPO, reward model"
ARMS = {
    MODELLED: [*PPO, *OF_A_MODEL],
    "PPO, true reward": [*PPO, *PENALTY, *arms.options(reward="exact")],
    "GRPO, true reward": [*PPO, *arms.options(reward="exact", advantage="grpo", kl="loss")],
    "PPO, random reward": [*PPO, *PENALTY, *arms.options(reward="random")],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Arithmetic with a verifiable reward.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning/arithmetic"))
    args = parser.parse_args()
    seeds = read_seeds()
    for seed in args.seeds:
        if seed not in seeds:
            seeds[seed] = OfSeed.read(seed, one_seed(args.out / f"seed-{seed}", seed))
            told = {seed: dataclasses.asdict(one) for seed, one in seeds.items()}
            RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    asked = [seeds[seed] for seed in args.seeds]
    found = arms.by_arm(one.outcomes for one in asked)
    print(arms.table(found))
    print(table_of_answers(arms.by_arm(one.answers for one in asked)))
    draw(found, HERE / "arithmetic.png")


@dataclass(frozen=True)
class OfSeed:
    """What a seed gave, by arm."""

    outcomes: dict[str, arms.Outcome]
    answers: dict[str, sums.Answers]  # with SFT, what all begin with

    @classmethod
    def read(cls, seed: int, runs: dict[str, Path]) -> OfSeed:
        """Of finished runs; a few of their samples are kept."""
        responses.keep("arithmetic", seed, runs)
        model = next(iter(runs.values())).parent / "model"
        found = cls(
            {arm: arms.outcome(run) for arm, run in runs.items()},
            {
                "SFT": sums.Answers.read(runs[MODELLED] / responses.BEFORE, model),
                **{arm: sums.Answers.read(run / responses.AFTER, model) for arm, run in runs.items()},
            },
        )
        for arm, one in found.outcomes.items():
            print(f"seed {seed}, {arm}: {one.before:.3f} -> {one.after:.3f}, KL {one.kl:.2f}", flush=True)
        return found


def read_seeds() -> dict[int, OfSeed]:
    """What earlier runs wrote."""
    told = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {
        int(seed): OfSeed(
            {arm: arms.Outcome.of_json(found) for arm, found in one["outcomes"].items()},
            {arm: sums.Answers(**found) for arm, found in one["answers"].items()},
        )
        for seed, one in told.items()
    }


def one_seed(directory: Path, seed: int) -> dict[str, Path]:
    """Where each arm of a seed lies, run to its end from one SFT policy."""
    data, model = directory / "data", directory / "model"
    if not model.is_dir():
        sums.write_data(data, seed, DEMONSTRATIONS, WRONG)
        sums.write_model(model, seed)
    given = [*small.given(model, data, seed), *TASK]
    sft = arms.run(directory / "sft", [*given, *SFT])
    given.append(f"policy_path={sft / 'stages' / 'sft' / 'policy'}")
    rm = arms.run(directory / "rm", [*given, *RM])
    own = {MODELLED: [f"reward.path={rm / 'stages' / 'rm' / 'reward_model'}"]}  # of the others it would be the critic
    return {
        arm: arms.run(arms.place(directory, arm), [*given, *overrides, *own.get(arm, [])])
        for arm, overrides in ARMS.items()
    }


def table_of_answers(rows: dict[str, list[sums.Answers]]) -> str:
    """Means over seeds, and each of them, as Markdown."""
    lines = ["| policy | numbers | by seed | distance from the sum | by seed |", "|---|---|---|---|---|"]
    for name, of_seeds in rows.items():
        well, far = [one.well_formed for one in of_seeds], [one.error for one in of_seeds]
        cells = [f"{fmean(well):.4f}", ", ".join(f"{one:.4f}" for one in well)]
        cells += [f"{fmean(far):.2f}", ", ".join(f"{one:.2f}" for one in far)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, list[arms.Outcome]], path: Path) -> None:
    """Exact match on held-out sums over iterations: a line for each seed, a colour for each arm."""
    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for number, (arm, outcomes) in enumerate(found.items()):
        for index, one in enumerate(outcomes):
            steps, gold = [point.step for point in one.points], [point.gold for point in one.points]
            axes.plot(steps, gold, color=f"C{number}", alpha=0.7, label=arm if not index else None)
    axes.set(xlabel="iteration", ylabel="exact match, held-out sums", title="Sums below 100, SFT on 30 % wrong sums")
    axes.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

"""Does it learn? Sums of two numbers below 100, held-out sums only: SFT on demonstrations of which 30 % are wrong, then
PPO with a reward model, PPO with the true reward, GRPO with the true reward, and PPO with a random reward as a control.

    python benchmarks/learning/arithmetic.py [--seeds 0 1 2] [--out DIR]

Every run is `rlhf-cluster run`, as a person types it; what is finished is not run again. Leaves `arithmetic.json` and
`arithmetic.png` beside this file, and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import arms
import matplotlib.pyplot as plt
import small
import sums

HERE = Path(__file__).parent
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
    found: dict[str, list[arms.Outcome]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm, outcome in one_seed(args.out / f"seed-{seed}", seed).items():
            found[arm].append(outcome)
            print(f"seed {seed}, {arm}: {outcome.before:.3f} -> {outcome.after:.3f}, KL {outcome.kl:.2f}", flush=True)
    print(arms.table(found))
    everything = {arm: [dataclasses.asdict(one) for one in outcomes] for arm, outcomes in found.items()}
    (HERE / "arithmetic.json").write_text(json.dumps({"seeds": args.seeds, "arms": everything}, indent=1) + "\n")
    draw(found, HERE / "arithmetic.png")


def one_seed(directory: Path, seed: int) -> dict[str, arms.Outcome]:
    """All arms of a seed, from one SFT policy."""
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
        arm: arms.outcome(arms.run(arms.place(directory, arm), [*given, *overrides, *own.get(arm, [])]))
        for arm, overrides in ARMS.items()
    }


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

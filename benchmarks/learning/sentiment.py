"""How far can a score be raised before it stops to mean what it stood for? Reviews are steered towards praise by PPO
against reward models of two sizes, with several KL coefficients; held-out prompts only.

    python benchmarks/learning/sentiment.py --data FOLDER [--seeds 0 1 2] [--out DIR]

The gold score is VADER's; the proxy is a reward model trained on VADER's rankings; a second lexicon (AFINN), which
neither PPO nor the reward models ever see, judges blindly. Beside PPO stands best-of-n from the same SFT policy, and a
random reward as a control. The forms of Gao et al. 2022 are fitted to what comes out. FOLDER holds VADER's snippets
(`snippets.py`).

Every run is `rlhf-cluster run`, as a person types it; what is finished is not run again, nor a seed that has its
figures in `sentiment.json`. Writes that file after every seed, leaves `sentiment.png` beside it and a few samples in
`samples/` (without prompts: they are the beginnings of people's reviews), and prints the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import arms
import gao
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import responses
import small
import snippets
from matplotlib.axes import Axes

HERE = Path(__file__).parent
RESULTS = HERE / "sentiment.json"
BEST_OF, BEST_OF_PROMPTS = 64, 100

TASK = arms.options(
    model__context=snippets.CONTEXT,
    data__max_prompt_tokens=64,
    generation__max_response_tokens=20,
    generation__flush_ms=300,
    evaluation__gold="vader",
)
SFT = arms.options(name="sft", stages="[sft]", sft__epochs=8, sft__batch_size=64, sft__optimizer__lr=2e-3)
PPO = arms.options(
    stages="[ppo]",
    ppo__steps=60,
    ppo__batch_size=128,
    ppo__minibatch_size=64,
    ppo__save_every=0,
    learner__policy__lr=3e-4,
    learner__policy__warmup_steps=3,
    learner__critic__lr=6e-4,
    learner__critic__warmup_steps=0,
)


@dataclass(frozen=True)
class RewardModel:
    """A proxy: how many of the policy's layers it keeps, and of how many prompts it saw four responses ranked."""

    layers: int
    prompts: int

    def options(self) -> list[str]:
        return arms.options(
            stages="[rm]",
            rm__layers=self.layers,
            rm__ranking__labeler="vader",
            rm__ranking__prompts=self.prompts,
            rm__ranking__responses=4,
            rm__ranking__tie_margin=0.05,
            rm__epochs=4,
            rm__batch_size=16,
            rm__optimizer__lr=1e-3,
        )


REWARD_MODELS = {"large": RewardModel(0, 4000), "small": RewardModel(1, 300)}
COEFFICIENTS = (0.0, 0.1, 0.5)
CONTROL = "random"  # the directory of its run


def main() -> None:
    parser = argparse.ArgumentParser(description="Sentiment steering with over-optimisation.")
    parser.add_argument("--data", type=Path, required=True, help="the folder with VADER's snippets")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/learning/sentiment"))
    args = parser.parse_args()
    seeds = read_seeds()
    for seed in args.seeds:
        if seed not in seeds:
            seeds[seed] = one_seed(Task(args.out / f"seed-{seed}", args.data, seed))
            told = {seed: dataclasses.asdict(one) for seed, one in seeds.items()}
            RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    asked = [seeds[seed] for seed in args.seeds]
    found = arms.by_arm(one.outcomes for one in asked)
    best = mean_best([one.best for one in asked])
    print(arms.table(found))
    print(responses.table_of_text(arms.by_arm(one.texts for one in asked)))
    fits = {name: fit_arm(outcomes) for name, outcomes in found.items() if name.endswith("coefficient 0")}
    fits["best-of-n"] = fit_best(best)
    for name, fit in fits.items():
        print(f"{name}: {fit.form}, a {fit.a:.3f}, b {fit.b:.3f}, R2 {fit.r_squared:.3f}, peak at d {fit.peak:.2f}")
    draw(found, best, fits, HERE / "sentiment.png")


@dataclass(frozen=True)
class OfSeed:
    """What a seed gave, by arm: outcomes, and what their responses look like; and the best of n."""

    outcomes: dict[str, arms.Outcome]
    texts: dict[str, responses.Text]
    best: list[Best]


def read_seeds() -> dict[int, OfSeed]:
    """What earlier runs wrote."""
    told = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return {int(seed): of_json(one) for seed, one in told.items()}


def of_json(told: dict[str, Any]) -> OfSeed:
    outcomes = {arm: arms.Outcome.of_json(one) for arm, one in told["outcomes"].items()}
    texts = {arm: responses.Text(**one) for arm, one in told["texts"].items()}
    return OfSeed(outcomes, texts, [Best(**one) for one in told["best"]])


def one_seed(task: Task) -> OfSeed:
    outcomes, texts, runs = {}, {"SFT": responses.read_text(task.before, task.model)}, task.arms()
    for arm, directory in runs.items():
        outcomes[arm] = one = arms.outcome(directory)
        texts[arm] = responses.read_text(directory / responses.AFTER, task.model)
        print(f"seed {task.seed}, {arm}: gold {one.before:+.3f} -> {one.after:+.3f}, KL {one.kl:.2f}", flush=True)
    responses.keep("sentiment", task.seed, runs, prompts=False)
    return OfSeed(outcomes, texts, best_of_n(task.best_of_n()))


@dataclass(frozen=True)
class Task:
    """All runs of a seed, in one directory. To ask for a finished run takes seconds: each is asked for once."""

    directory: Path
    source: Path
    seed: int

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @cached_property
    def given(self) -> list[str]:
        """What all runs from the SFT policy are told."""
        data = self.directory / "data"
        if not self.model.is_dir():
            snippets.write_data(self.source, data)
            snippets.write_model(self.source, self.model, self.seed)
        told = [*small.given(self.model, data, self.seed), *TASK]
        sft = arms.run(self.directory / "sft", [*told, *SFT])
        return [*told, f"policy_path={sft / 'stages' / 'sft' / 'policy'}"]

    @cached_property
    def rewards(self) -> dict[str, str]:
        """By name, the option that names the reward model."""
        found = {}
        for name, model in REWARD_MODELS.items():
            trained = arms.run(self.directory / f"rm-{name}", [*self.given, *model.options()])
            found[name] = f"reward.path={trained / 'stages' / 'rm' / 'reward_model'}"
        return found

    def arms(self) -> dict[str, Path]:
        """The directory of each arm, run to its end."""
        asked = {
            f"PPO, {name} reward model, coefficient {coef:g}": (f"ppo-{name}-{coef:g}", self.rewards[name], coef)
            for name in REWARD_MODELS
            for coef in COEFFICIENTS
        }
        asked["PPO, random reward"] = (CONTROL, "reward=random", 0.1)
        return {
            arm: arms.run(self.directory / place, [*self.given, *PPO, reward, f"ppo.kl.coef={coef}"])
            for arm, (place, reward, coef) in asked.items()
        }

    @property
    def before(self) -> Path:
        """What the SFT policy said; all arms begin with it."""
        return self.directory / CONTROL / responses.BEFORE

    def best_of_n(self) -> Path:
        """The SFT policy's samples, many of each prompt, with gold and proxy; the one iteration after them is of no
        interest."""
        options = [
            *self.given,
            *PPO,
            self.rewards["large"],
            "ppo.steps=1",
            f"data.heldout_prompts={BEST_OF_PROMPTS}",
            f"evaluation.samples_per_prompt={BEST_OF}",
        ]
        return arms.run(self.directory / "best-of-n", options) / responses.BEFORE


@dataclass(frozen=True)
class Best:
    """The best of n by the proxy."""

    n: int
    kl: float
    gold: float
    score: float


def best_of_n(heldout: Path) -> list[Best]:
    table = pq.read_table(heldout)
    gold, score = (table.column(name).to_numpy().reshape(-1, BEST_OF) for name in ("gold", "score"))
    sizes = [2**power for power in range(BEST_OF.bit_length())]
    return [
        Best(n, gao.kl_of_best_of_n(n), *(gao.best_of_n(score, value, n) for value in (gold, score))) for n in sizes
    ]


def mean_best(seeds: list[list[Best]]) -> list[Best]:
    """Over seeds, for each n."""
    return [
        Best(of_n[0].n, of_n[0].kl, fmean(one.gold for one in of_n), fmean(one.score for one in of_n))
        for of_n in zip(*seeds, strict=True)
    ]


def fit_arm(outcomes: list[arms.Outcome]) -> gao.Fit:
    """Over the iterations of all seeds."""
    points = [(point.kl, point.gold - one.before) for one in outcomes for point in one.points if point.step]
    return gao.fit("rl", [max(kl, 0.0) ** 0.5 for kl, _ in points], [gain for _, gain in points])


def fit_best(best: list[Best]) -> gao.Fit:
    return gao.fit("bon", [one.kl**0.5 for one in best], [one.gold - best[0].gold for one in best])


def curve(panel: Axes, fit: gao.Fit, start: float, furthest: float) -> None:
    distance = np.linspace(furthest / 100, furthest, 100)
    panel.plot(distance, start + fit(distance), color="0.4", linestyle="--", linewidth=1)


def draw(found: dict[str, list[arms.Outcome]], best: list[Best], fits: dict[str, gao.Fit], path: Path) -> None:
    """Gold (line) and proxy (dotted, gain in its own units) over the square root of the KL, with Gao's forms (dashed);
    a panel for each reward model."""
    figure, panels = plt.subplots(1, len(REWARD_MODELS), figsize=(12, 4.6), sharey=True, constrained_layout=True)
    for panel, name in zip(panels, REWARD_MODELS, strict=True):
        proxy = panel.twinx()
        for colour, coef in enumerate(COEFFICIENTS):
            for index, one in enumerate(found.get(f"PPO, {name} reward model, coefficient {coef:g}", [])):
                distance = [max(point.kl, 0.0) ** 0.5 for point in one.points]
                label = f"PPO, coefficient {coef:g}" if not index else None
                panel.plot(distance, [point.gold for point in one.points], color=f"C{colour}", marker=".", label=label)
                gain = [point.score - one.points[0].score for point in one.points]
                proxy.plot(distance, gain, color=f"C{colour}", linestyle=":", alpha=0.6)
        if name == "large":
            panel.plot([one.kl**0.5 for one in best], [one.gold for one in best], "k.-", label="best of n")
            proxy.plot([one.kl**0.5 for one in best], [one.score - best[0].score for one in best], "k:", alpha=0.6)
            curve(panel, fits["best-of-n"], best[0].gold, best[-1].kl ** 0.5)
        unpenalised = f"PPO, {name} reward model, coefficient 0"
        furthest = max(point.kl for one in found[unpenalised] for point in one.points) ** 0.5
        curve(panel, fits[unpenalised], fmean(one.before for one in found[unpenalised]), furthest)
        panel.set(title=f"{name} reward model", xlabel="square root of KL (nats)", ylabel="gold score (line)")
        proxy.set_ylabel("gain of the proxy (dotted)")
        panel.legend(loc="upper left" if name == "small" else "lower right")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

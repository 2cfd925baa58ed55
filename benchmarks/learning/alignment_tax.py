"""What does alignment cost elsewhere? Perplexity on text that the run is not about, of the pretrained model, after SFT,
after PPO and after PPO with the pretraining mix (PPO-ptx): the quickstart's recipe, and both once more for longer and
without a KL penalty, since so few iterations cost little; and PPO against a random reward as a control. The order of
InstructGPT's figures 33 and 34 is to be met or missed. A second lexicon (AFINN), which nothing is trained on, judges
the responses blindly.

    python benchmarks/learning/alignment_tax.py --text FILE [--seeds 0 1 2] [--coef 1.0] [--out DIR]

FILE is plain text; the last fifth of its paragraphs is held out, the mix is of the others. Every run is
`rlhf-cluster run`, as a person types it; what is finished is not run again. Adds its seeds to `alignment_tax.json`
beside this file, draws `alignment_tax.png`, leaves a few samples in `samples/`, and prints the tables of all that is
there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import arms
import matplotlib.pyplot as plt
import responses
import torch
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from rlhf_cluster.config import ModelConfig
from rlhf_cluster.models.build import prepare_model
from rlhf_cluster.results import result_policy

HERE = Path(__file__).parent
RESULTS = HERE / "alignment_tax.json"
WINDOW, TOKENS = 128, 16384  # of the held-out text
FURTHER = arms.options(ppo__steps=25, ppo__kl__coef=0.0)
PTX = arms.options(ppo__ptx__ratio=1, ppo__ptx__tokens=64)  # the paper has 8 examples an episode; on two cores one


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity before and after.")
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--coef", type=float, default=1.0, help="of the pretraining mix")
    parser.add_argument("--out", type=Path, default=Path("runs/learning/alignment_tax"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    train, heldout = split(args.text, args.out)
    measured = {
        "coef": args.coef,
        "window": WINDOW,
        "tokens": TOKENS,
        "text": xxhash.xxh3_64_hexdigest(heldout.encode()),
    }
    found = read(measured)
    for seed in args.seeds:
        runs = one_seed(args.out / f"seed-{seed}", seed, train, args.coef)
        found.add(seed, runs, heldout)
        responses.keep("alignment_tax", seed, runs)
        RESULTS.write_text(json.dumps({**measured, **dataclasses.asdict(found)}, indent=1) + "\n")
    print(arms.table({arm: list(of.values()) for arm, of in found.outcomes.items()}))
    print(responses.table_of_text({policy: list(of.values()) for policy, of in found.texts.items()}))
    print("| policy | perplexity | by seed |\n|---|---|---|")
    for stage, values in found.perplexity.items():
        mean, error = arms.mean_and_error(list(values.values()))
        print(f"| {stage} | {mean:.3f} ± {error:.3f} | {', '.join(f'{value:.3f}' for value in values.values())} |")
    draw(found.perplexity, HERE / "alignment_tax.png")


@dataclass
class Found:
    """By policy and seed."""

    perplexity: dict[str, dict[int, float]] = field(default_factory=dict)
    outcomes: dict[str, dict[int, arms.Outcome]] = field(default_factory=dict)
    texts: dict[str, dict[int, responses.Text]] = field(default_factory=dict)

    def add(self, seed: int, runs: dict[str, Path], heldout: str) -> None:
        tokenizer = result_policy(runs["PPO"])
        self.texts.setdefault("SFT", {})[seed] = responses.read_text(runs["PPO"] / responses.BEFORE, tokenizer)
        for arm, run in runs.items():
            self.outcomes.setdefault(arm, {})[seed] = arms.outcome(run)
            self.texts.setdefault(arm, {})[seed] = responses.read_text(run / responses.AFTER, tokenizer)
        for stage, policy in policies(runs).items():
            self.perplexity.setdefault(stage, {})[seed] = perplexity(policy, heldout)
            print(f"seed {seed}, {stage}: perplexity {self.perplexity[stage][seed]:.3f}", flush=True)


def read(measured: dict[str, object]) -> Found:
    """What earlier runs found. Raises SystemExit where they measured something else."""
    if not RESULTS.is_file():
        return Found()
    told = json.loads(RESULTS.read_text())
    perplexities, outcomes, texts = (told.pop(name) for name in ("perplexity", "outcomes", "texts"))
    if told != measured:
        raise SystemExit(f"{RESULTS} was measured with {told}, not with {measured}; move it away to begin anew")
    return Found(
        {stage: {int(seed): value for seed, value in values.items()} for stage, values in perplexities.items()},
        {arm: {int(seed): arms.Outcome.of_json(one) for seed, one in of.items()} for arm, of in outcomes.items()},
        {arm: {int(seed): responses.Text(**one) for seed, one in of.items()} for arm, of in texts.items()},
    )


def split(text: Path, directory: Path) -> tuple[Path, str]:
    """The file to mix in, and the text that is held out."""
    paragraphs = [line for line in text.read_text("utf-8").splitlines() if line.strip()]
    cut = len(paragraphs) * 4 // 5
    directory.mkdir(parents=True, exist_ok=True)
    train = directory / "train.txt"
    train.write_text("\n".join(paragraphs[:cut]) + "\n", "utf-8")
    return train, "\n".join(paragraphs[cut:])


def one_seed(directory: Path, seed: int, train: Path, coef: float) -> dict[str, Path]:
    """PPO, and all others from the same SFT policy against the same reward model."""
    whole = arms.run(directory / "ppo", ["recipe=quickstart", f"seed={seed}"])
    stages = whole / "stages"
    start = ["recipe=quickstart", f"seed={seed}", "stages=[ppo]", f"policy_path={stages / 'sft' / 'policy'}"]
    alone = [*start, f"reward.path={stages / 'rm' / 'reward_model'}"]
    mixed = [*alone, f"data.pretraining={train}", f"ppo.ptx.coef={coef}", *PTX]
    return {
        "PPO": whole,
        "PPO-ptx": arms.run(directory / f"ptx-{coef:g}", mixed),
        "PPO, further": arms.run(directory / "ppo-further", [*alone, *FURTHER]),
        "PPO-ptx, further": arms.run(directory / f"ptx-{coef:g}-further", [*mixed, *FURTHER]),
        "PPO, random reward": arms.run(directory / "random", [*start, "reward=random"]),
    }


def policies(runs: dict[str, Path]) -> dict[str, Path]:
    """Where each policy lies, in the order of the table."""
    return {
        "pretrained": prepare_model(ModelConfig("smollm2_135m")),
        "SFT": runs["PPO"] / "stages" / "sft" / "policy",
        **{arm: result_policy(run) for arm, run in runs.items()},
    }


@torch.no_grad()
def perplexity(policy: Path, text: str) -> float:
    """exp of the mean negative log-likelihood, nats per token, over windows of `WINDOW` tokens without overlap."""
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text)["input_ids"][:TOKENS]).view(-1, WINDOW)
    losses = [float(model(input_ids=window, labels=window).loss) for window in ids.split(8)]
    return math.exp(sum(losses) / len(losses))


def draw(found: dict[str, dict[int, float]], path: Path) -> None:
    """A bar for each policy's mean, a dot for each seed."""
    figure, axes = plt.subplots(figsize=(7.5, 3.8), constrained_layout=True)
    axes.bar(list(found), [arms.mean_and_error(list(values.values()))[0] for values in found.values()], color="0.8")
    for place, values in enumerate(found.values()):
        axes.plot([place] * len(values), list(values.values()), "k.")
    axes.axhline(next(iter(found["pretrained"].values())), color="0.4", linestyle="--", linewidth=1)
    axes.set(ylabel="perplexity, held-out text", title="What alignment costs elsewhere (lower is better)")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

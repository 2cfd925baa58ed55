"""The config tree: what composes, what is refused and in which words, and the way to a file and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_cluster import config
from rlhf_cluster.config import ConfigError, RunConfig, conf_directory, differences, load, load_file, to_yaml, validate
from rlhf_cluster.config.stages import RAIL_ACTIONS
from rlhf_cluster.config.tree import optimizers
from rlhf_cluster.loop.guardrails import ACTIONS

PRIMARIES = ("pipeline", "sft", "rm", "dpo", "ppo")
FILES = ["data.prompts=x", "data.demonstrations=x", "data.comparisons=x"]
ANY_PATHS = [*FILES, "data.path=x", "model.path=x", "policy_path=x", "reward.path=x"]
PATHS = [*ANY_PATHS, "data.pretraining=x"]
GROUPS = {
    path.name: sorted(p.stem for p in path.glob("*.yaml")) for path in conf_directory().iterdir() if path.is_dir()
}
RECIPES = GROUPS.pop("recipe")


def rounds() -> list[list[str]]:
    """One choice of every group at a time, until each was chosen: as many compositions as the largest group has."""
    columns = [[f"{group}={choice}" for choice in choices] for group, choices in GROUPS.items()]
    return [[choice for choice in row if choice is not None] for row in zip_longest(*columns)]


@pytest.fixture
def cfg() -> RunConfig:
    """A config that `validate` accepts."""
    tree = RunConfig()
    tree.model.source = "tiny"
    tree.data = config.DataConfig(prompts="x", demonstrations="x", comparisons="x")
    return tree


def test_the_groups_are_all_tried() -> None:
    assert {choice for row in rounds() for choice in row} == {f"{g}={c}" for g, cs in GROUPS.items() for c in cs}
    assert len(GROUPS) >= 10 and "smoke" in RECIPES


@pytest.mark.parametrize("number", range(len(rounds())))
def test_every_choice_of_every_group_composes(number: int) -> None:
    assert isinstance(load([*rounds()[number], *ANY_PATHS], PRIMARIES[number % len(PRIMARIES)]), RunConfig)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_and_goes_to_a_file_and_back(recipe: str, tmp_path: Path) -> None:
    given = load([f"recipe={recipe}", *PATHS])
    assert given.name == recipe
    (tmp_path / "resolved.yaml").write_text(to_yaml(given))
    assert load_file(tmp_path / "resolved.yaml") == given


def test_every_primary_is_tried() -> None:
    assert {path.stem for path in conf_directory().glob("*.yaml")} == set(PRIMARIES)
    assert len(rounds()) >= len(PRIMARIES)


def test_overrides_win_over_choices_and_choices_over_recipes_and_recipes_over_defaults() -> None:
    """The recipe has a coefficient and a clip range of its own."""
    quick = load(["recipe=quickstart"]).ppo
    assert (quick.kl.kind, quick.kl.coef, quick.clip, quick.batch_size) == ("fixed", 0.02, 0.2, 64)
    given = load(["recipe=quickstart", "ppo.steps=9", "kl=loss", "advantage=gspo", "ppo.clip=0.1"]).ppo
    assert (given.kl.coef, given.kl.loss_coef, given.clip, given.clip_high) == (0.0, 0.04, 0.1, 4e-4)
    assert (given.steps, given.batch_size, given.samples_per_prompt) == (9, 64, 8)
    assert type(given) is config.PPOConfig  # plain dataclasses, no DictConfig
    assert load(["recipe=quickstart", "kl=none"]).ppo.kl.coef == 0.0


@pytest.mark.parametrize("recipe", ["quickstart", "summarize_from_feedback"])
def test_a_choice_beside_a_recipe_is_that_choice(recipe: str) -> None:
    """What its file says stands in the config, whatever these recipes have there; of the KL, a `kl` beside it."""
    sections = {"kl": ["ppo", "kl"], "advantage": ["ppo"], "reward": ["reward"]}
    fits = ["ppo.batch_size=64", "ppo.minibatch_size=8"]
    for row in zip_longest(*(GROUPS[group] for group in sections)):
        chosen = {group: choice for group, choice in zip(sections, row, strict=True) if choice and choice != "gae"}
        asked = [f"{group}={choice}" for group, choice in chosen.items()]
        tree = dataclasses.asdict(load([f"recipe={recipe}", *asked, *PATHS, *fits]))
        for group, choice in chosen.items():
            given = functools.reduce(dict.__getitem__, sections[group], tree)
            said = yaml.safe_load((conf_directory() / group / f"{choice}.yaml").read_text())
            if "kl" in chosen:
                said.pop("kl", None)
            assert covers(given, said), choice


def covers(found: Any, said: Any) -> bool:
    """Whether everything that `said` says stands in `found`."""
    if isinstance(said, dict):
        return all(covers(found[key], value) for key, value in said.items())
    if isinstance(said, list):
        return all(covers(mine, theirs) for mine, theirs in zip(found, said, strict=True))
    return bool(found == said)


def test_the_papers_numbers_are_the_defaults(cfg: RunConfig) -> None:
    """InstructGPT, appendix C.4."""
    ppo = cfg.ppo
    assert (ppo.batch_size, ppo.minibatch_size, ppo.epochs, ppo.clip, ppo.kl.coef) == (512, 64, 1, 0.2, 0.02)
    assert (ppo.advantage.gamma, cfg.generation.temperature, cfg.learner.policy.betas) == (1.0, 1.0, (0.9, 0.95))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.stepz=3", r"^unknown key 'ppo\.stepz'; did you mean ppo\.steps"),
        ("modle=tiny", r"^unknown key 'modle'; did you mean model"),
        ("zzzzqqq=1", r"^unknown key 'zzzzqqq'$"),
        ("+ppo.steps=1", r"^'\+ppo\.steps=1' would add a key, but all keys are there; leave out the \+$"),
        ("ppo.steps=1,2", r"^'ppo\.steps=1,2' names several values, but a run takes one"),
        ("name=a b;c", r"cannot be read; an override is KEY=VALUE.*a value with special characters is quoted"),
        ("ppo.steps=abc", r"^ppo\.steps: Value 'abc' of type 'str' could not be converted to Integer$"),
        ("ppo.batch_size=1.5", r"^ppo\.batch_size: Value '1\.5'"),
        ("ppo=3", r"^ppo=3: ppo is a section; set a key of it, as ppo\.steps$"),
        ("ppo.learning_rate=1", r"did you mean sft\.optimizer\.lr or rm\.optimizer\.lr or dpo\.optimizer\.lr"),
        (
            "ppo.guardrails.kl={limt: 9}",
            r"^unknown key 'ppo\.guardrails\.kl\.limt'; did you mean ppo\.guardrails\.kl\.limit",
        ),
        ("stages=sft", r"^stages=sft: it must be a list, as stages=\[sft\]$"),
        ("reward.parts=length", r"^reward\.parts=length: it must be a list, as reward\.parts=\[\{kind: length\}\]$"),
        ("reward.parts=[length]", r"^reward\.parts\[0\]=length: it must be a section, as \{kind: length\}$"),
        (
            "reward.parts=[{kind: length, wieght: 1}]",
            r"^reward\.parts\[0\]: unknown key 'wieght'; did you mean weight\?$",
        ),
        ("reward.parts=[{kind: length}, {kind: random, weight: abc}]", r"parts\[1\]\.weight=abc: it must be a number$"),
        ("kl=3", r"^kl=3: there is no such kl; there are adaptive, fixed, loss, none$"),
        ("model=nope", r"^model=nope: there is no such model; there are gpt2, .*tiny$"),
        ("recipe=nope", r"^recipe=nope: there is no such recipe; there are hh, "),
        ("stages=[", r"^'stages=\[' cannot be read; an override is KEY=VALUE"),
        ("ppo.steps", r"^'ppo\.steps' cannot be read; an override is KEY=VALUE"),
        ("~ppo", r"^'~ppo' would remove a key"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load([override])


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no stage 'grpo'; there are dpo, pipeline, ppo, rm, sft"):
        load([], "grpo")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("ppo.minibatch_size=100", r"ppo\.minibatch_size=100 does not divide ppo\.batch_size=512; use 64 or 128"),
        ("ppo.minibatch_size=1024", r"ppo\.minibatch_size=1024 does not divide ppo\.batch_size=512; use 512"),
        ("ppo.samples_per_prompt=3", r"ppo\.samples_per_prompt=3 does not divide ppo\.batch_size=512"),
        ("learner.resources.workers=3", r"learner\.resources\.workers=3 does not divide ppo\.minibatch_size=64"),
        ("generation.max_response_tokens=300", r"256 and .*300 make 556, more than model\.context=512; lower one"),
        ("learner.engine.zero_stage=4", r"learner\.engine\.zero_stage=4: it must be one of 0, 1, 2, 3"),
        ("reward.resources.workers=0", r"reward\.resources\.workers=0: it must be at least 1"),
        ("learner.critic.lr=0", r"learner\.critic\.lr=0: it must be above 0"),
        ("generation.temperature=0", r"generation\.temperature=0: it must be above 0"),
        ("seed=-1", r"seed=-1: it must be from 0 to 4294967295"),
        (
            "ppo.advantage.kind=critic",
            r"ppo\.advantage\.kind=critic: it must be one of gae, reinforce_plus_plus, grpo, ",
        ),
        ("ppo.loss_mean=sum", r"ppo\.loss_mean=sum: it must be one of token, response, constant"),
        ("ppo.ratio=word", r"ppo\.ratio=word: it must be one of token, response"),
        ("ppo.ema_decay=1", r"ppo\.ema_decay=1\.0: it must be from 0 up to but not 1"),
        ("ppo.result=ema", r"ppo\.result=ema, but ppo\.ema_decay=0\.0 keeps no average; use a decay as 0\.992"),
        ("ppo.overlong_buffer=20", r"ppo\.overlong_buffer=20: it must be from 0 up to but not 1"),
        ("ppo.off_policy.low=6", r"ppo\.off_policy\.low=6, high=5: low must be below high"),
        ("ppo.max_staleness=-1", r"ppo\.max_staleness=-1: it must not be negative"),
        ("seed=4294967296", r"seed=4294967296: it must be from 0 to 4294967295"),
        ("generation.kv_cache_memory=1", r"generation\.kv_cache_memory=1: it must be 0 or at least 1048576"),
        ("sft.optimizer.warmup_steps=-1", r"sft\.optimizer\.warmup_steps=-1: it must not be negative"),
        ("generation.resources.memory=-5", r"generation\.resources\.memory=-5: it must not be negative"),
        ("cluster.start_timeout_s=-1", r"cluster\.start_timeout_s=-1: it must be above 0"),
        ("data.heldout_fraction=1", r"data\.heldout_fraction=1: it must be from 0 up to but not 1"),
        ("ppo.epochs=0", r"ppo\.epochs=0: it must be at least 1"),
        ("rm.ranking.responses=1", r"rm\.ranking\.responses=1: it must be at least 2"),
    ],
)
def test_what_cannot_run_is_refused_with_its_numbers(cfg: RunConfig, change: str, sentence: str) -> None:
    validate(cfg)
    path, value = change.split("=")
    *parents, name = path.split(".")
    node = cfg
    for parent in parents:
        node = getattr(node, parent)
    assert hasattr(node, name)
    setattr(node, name, value if value.isalpha() else float(value) if "ema" in name else int(value))
    with pytest.raises(ConfigError, match=sentence):
        validate(cfg)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stages": []}, "stages is empty"),
        ({"stages": ["ppo", "sft"]}, r"stages=\['ppo', 'sft'\]: each at most once, in the order sft, rm, dpo, ppo"),
        ({"stages": ["sft", "grpo"]}, "stages=grpo: it must be one of sft, rm, dpo, ppo"),
        ({"stages": ["ppo"]}, r"reward\.path is empty and rm is not among the stages"),
        ({"model": config.ModelConfig()}, r"model\.path is empty"),
        ({"data": config.DataConfig(prompts="x")}, "data.demonstrations is empty; stage sft needs that file with data"),
        ({"data": config.DataConfig(prompts="x"), "stages": ["rm"]}, "data.comparisons is empty; stage rm needs"),
        ({"data": config.DataConfig(source="hh")}, r"data\.path is empty; data=hh needs the file"),
        (
            {"ppo": config.PPOConfig(kl=config.KLConfig(coef=math.nan))},
            r"ppo\.kl\.coef=nan: it must be a finite number",
        ),
        (
            {"ppo": config.PPOConfig(kl=config.KLConfig("none", 0.0, loss_coef=0.1))},
            r"ppo\.kl\.loss_coef=0\.1, but ppo\.kl\.kind=none starts no reference; use kl=fixed, or 0",
        ),
        ({"ppo": config.PPOConfig(kl=config.KLConfig("none", 0.1))}, r"ppo\.kl\.coef=0\.1, but ppo\.kl\.kind=none"),
        (
            {"ppo": config.PPOConfig(kl=config.KLConfig("adaptive", 0.0))},
            r"ppo\.kl\.coef=0\.0, ppo\.kl\.loss_coef=0\.0: ppo\.kl\.kind=adaptive steers one coefficient",
        ),
        ({"ppo": config.PPOConfig(kl=config.KLConfig(loss_estimator="k1"))}, r"loss_estimator=k1: .* one of k2, k3"),
        (
            {"ppo": config.PPOConfig(ptx=config.PTXConfig(27.8))},
            r"ppo\.ptx\.coef=27\.8, but data\.pretraining is empty",
        ),
        (
            {
                "ppo": config.PPOConfig(ptx=config.PTXConfig(1.0, tokens=513)),
                "data": config.DataConfig(source="sentiment", pretraining="x"),
            },
            r"ptx\.tokens=513 is more than model\.context=512",
        ),
        ({"ppo": config.PPOConfig(dual_clip=0.5)}, r"ppo\.dual_clip=0\.5: it must be above 1, or 0"),
        ({"cluster": config.ClusterConfig("foo")}, r"cluster\.address=foo: it must be local, auto or HOST:PORT"),
        ({"evaluation": config.EvaluationConfig("foo")}, "gold=foo: it must be one of nothing, vader, exact, letters"),
        ({"name": "x" * 101}, r"name=xxxxx.*: 101 letters; at most 100"),
        ({"name": ".."}, r"name=\.\.: only letters, digits, \., _ and -, and no \. at the beginning"),
        ({"resume": "maybe"}, "resume=maybe: it must be one of auto, never"),
    ],
)
def test_stages_without_what_they_need_are_refused(cfg: RunConfig, change: dict[str, object], sentence: str) -> None:
    for name, value in change.items():
        setattr(cfg, name, value)
    with pytest.raises(ConfigError, match=sentence):
        validate(cfg)


def test_ppo_alone_runs_on_a_random_reward(cfg: RunConfig) -> None:
    cfg.stages = ["ppo"]
    cfg.reward.parts = [config.RewardPart("random")]
    assert validate(cfg) is cfg


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ppo: {stepz: 3}", r"resolved\.yaml: ppo\.stepz: Key 'stepz' not in 'PPOConfig'"),
        ("[1]", r"resolved\.yaml: "),
        ("ppo: [", r"resolved\.yaml, line 1 is not YAML; a resolved config is wanted"),
        ("", r"resolved\.yaml is empty; a resolved config is wanted"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load_file(tmp_path / "resolved.yaml")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*absent\.yaml: No such file"):
        load_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "change",
    [
        "dir=/elsewhere",
        "resume=never",
        "logging=tensorboard",
        "cluster.call_timeout_s=9",
        "learner.resources.workers=2",
        "learner.engine.tokens_per_micro_batch=9",
        "rm.engine.zero_stage=3",
        "generation.kv_cache_memory=9000000",
    ],
)
def test_what_may_change_when_a_run_goes_on(change: str) -> None:
    assert differences(load([change]), load([])) == []


def test_what_makes_another_run_is_named_by_its_whole_key() -> None:
    found = differences(load(["ppo.kl.coef=0.5", "seed=3", "name=b"]), load(["name=b"]))
    assert found == ["seed=3, was 0", "ppo.kl.coef=0.5, was 0.02"]
    mended = ["ppo.guardrails.kl.limit=9", "ppo.guardrails.max_skips=3", "reward.deadline_s=2", "ppo.empty_wait_s=9"]
    assert differences(load(mended), load([])) == []


GROUPED = [name for name in GROUPS["advantage"] if name not in ("gae", "reinforce_plus_plus")]


@pytest.mark.parametrize("advantage", GROUPS["advantage"])
def test_an_advantage_is_one_value(advantage: str) -> None:
    """Nothing else has to be said, but what is said wins. The KL is where its paper has it."""
    ppo = load([f"advantage={advantage}", "ppo.clip=0.1"]).ppo
    assert ppo.clip == 0.1
    assert (ppo.samples_per_prompt > 1) == ppo.advantage.compares_groups == (advantage in GROUPED)
    kl, nowhere = ("fixed", 0.02, 0), ("none", 0, 0)
    elsewhere = {"grpo": ("fixed", 0, 0.04), "reinforce_plus_plus_baseline": ("fixed", 0, 0.02)}
    elsewhere |= dict.fromkeys(("dapo", "dr_grpo", "gspo"), nowhere)
    assert (ppo.kl.kind, ppo.kl.coef, ppo.kl.loss_coef) == elsewhere.get(advantage, kl)
    assert (ppo.overlong_buffer == 0.2) == ppo.dynamic_sampling == (advantage == "dapo")
    rewarded = load([f"advantage={advantage}", "kl=fixed"]).ppo.kl
    assert (rewarded.kind, rewarded.coef, rewarded.loss_coef) == ("fixed", 0.02, 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            [],
            r"weights\.transport=nccl is between GPUs .*learner\.\S+num_gpus=0 and generation\.\S+=0; give each",
        ),
        (["learner.resources.num_gpus=1", "generation.resources.num_gpus=0.5"], r"=1 and generation\.\S+=0\.5; give"),
        (["weights=ipc"], r"weights\.transport=ipc is for learner and generation on one GPU, .* a share of it below 1"),
        (["weights=ipc", "learner.resources.num_gpus=1", "generation.resources.num_gpus=1"], r"a share of it below 1"),
        (
            [
                *("weights=ipc", "learner.resources={num_gpus: 0.4, workers: 2}", "generation.resources.num_gpus=0.4"),
                *("learner.lora.rank=8", "learner.lora.publish=merged"),
            ],
            r"weights\.transport=ipc has every rank .* on the first of 2 alone; use learner\.resources\.workers=1",
        ),
        (["learner.lora.rank=8", "learner.lora.publish=adapter"], r"nccl sends whole weights, but learner\.lora\.publ"),
    ],
)
def test_a_transport_without_what_it_goes_over_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(["weights=nccl", "policy_path=x", "reward=random", *overrides], "ppo")


@pytest.mark.parametrize(("transport", "gpus"), [("shm", 0), ("gloo", 0), ("nccl", 1), ("ipc", 0.4)])
def test_a_transport_that_has_its_gpus_is_taken(transport: str, gpus: float) -> None:
    each = [f"{role}.resources.num_gpus={gpus}" for role in ("learner", "generation")]
    assert load([f"weights={transport}", "policy_path=x", "reward=random", *each], "ppo").weights.transport == transport


def test_what_a_critic_or_a_group_is_needed_for_is_refused_without() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.samples_per_prompt=1, but ppo\.advantage\.kind=grpo compares"):
        load(["advantage=grpo", "ppo.samples_per_prompt=1"])
    with pytest.raises(ConfigError, match=r"ppo\.critic_warmup=2, but ppo\.advantage\.kind=rloo has no critic; use 0"):
        load(["advantage=rloo", "ppo.critic_warmup=2"])


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("{kind: judge}", r"reward\.parts\[0\]\.kind=judge: it must be one of model, random, function"),
        ("{kind: function}", r"reward\.parts\[0\]\.path is empty; a part of kind function needs it"),
        ("{kind: regex}", r"reward\.parts\[0\]\.pattern is empty; a part of kind regex needs it"),
        ("{kind: regex, pattern: '('}", r"reward\.parts\[0\]\.pattern=\(: it is no regular expression"),
        ("{kind: json_schema}", r"reward\.parts\[0\]\.schema is empty"),
        ("{kind: exact, column: ''}", r"reward\.parts\[0\]\.column is empty"),
        ("{kind: http, path: 'host:80'}", r"reward\.parts\[0\]\.path=host:80: it must be http://HOST:PORT/PATH"),
        ("{kind: exact, on_failure: retry}", r"on_failure=retry: it must be one of nothing, drop, neutral, stop"),
        ("{kind: exact, name: 'a/b'}", r"reward\.parts\[0\]\.name=a/b: only letters, digits"),
        ("{kind: exact, weight: nan}", r"reward\.parts\[0\]\.weight=nan: it must be a finite number"),
        ("{kind: exact, wait: 3}", r"parts\[0\]: unknown key 'wait'; did you mean weight"),
    ],
)
def test_a_part_of_the_score_that_cannot_work_is_refused(part: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load([f"reward.parts=[{part}]"])


def test_parts_of_the_score_are_mixed_in_one_override() -> None:
    parts = load(["reward.parts=[{kind: math, weight: 2}, {kind: length, weight: -0.01}]"]).reward.parts
    assert parts == [config.RewardPart("math", weight=2.0), config.RewardPart("length", weight=-0.01)]
    with pytest.raises(ConfigError, match=r"reward\.parts is empty"):
        load(["reward.parts=[]"])


@pytest.mark.parametrize(
    ("key", "value"), [("deadline_s", 0), ("batch_size", 0), ("retries", -1), ("breaker_failures", 0)]
)
def test_patience_has_its_bounds(key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.{key}={value}"):
        load([f"reward.{key}={value}"])


def test_dynamic_sampling_needs_groups() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.dynamic_sampling=true, but ppo\.advantage\.kind=gae compares no"):
        load(["ppo.dynamic_sampling=true"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["ppo.guardrails.kl.action=halt"],
            r"ppo\.guardrails\.kl\.action=halt: it must be one of warn, skip, rollback",
        ),
        (["ppo.guardrails.clipfrac.action=stop"], r"clipfrac\.action=stop, but its limit is 0, which watches nothing"),
        (["ppo.guardrails.kl={limit: 9, action: rollback}"], r"kl\.action=rollback, but ppo\.save_every=0 leaves no"),
        (
            ["ppo.guardrails.kl={limit: 9, action: rollback}", "ppo.save_every=1", "ppo.keep_checkpoints=1"],
            r"kl\.action=rollback judges a policy by its samples, .*ppo\.keep_checkpoints=2",
        ),
        (["kl=adaptive", "ppo.kl.horizon=100"], r"one batch of 512 could turn the coefficient negative; .*than 102\.4"),
        (["ppo.clip=0"], r"ppo\.clip=0\.0: it must be above 0"),
        (["ppo.value_coef=-1"], r"ppo\.value_coef=-1\.0: it must be above 0"),
        (["learner.policy.betas=[0.9,1.0]"], r"learner\.policy\.betas=1\.0: it must be from 0 up to but not 1"),
        (["dpo.loss=ipo", "dpo.label_smoothing=0.1"], r"dpo\.label_smoothing=0\.1, but dpo\.loss=ipo has no such term"),
        (["advantage=dapo", "ppo.max_refill=0"], r"ppo\.dynamic_sampling=true, but ppo\.max_refill=0 samples nothing"),
        (["ppo.ratio=response"], r"ppo\.ratio=response, but ppo\.advantage\.kind=gae tells the tokens of a response"),
        (["advantage=grpo", "ppo.advantage.gamma=0.9"], r"gamma=0\.9, but ppo\.advantage\.kind=grpo discounts nothing"),
        (["ppo.missing_eos=replace"], r"ppo\.missing_eos=replace, but ppo\.missing_eos_penalty=0: a response that"),
        (
            ["generation.ignore_eos=true", "ppo.missing_eos_penalty=1"],
            r"ignore_eos=true: no response ends, so .*=1 would",
        ),
        (
            ["kl=adaptive", "ppo.kl.loss_coef=0.1"],
            r"coef=0\.02, ppo\.kl\.loss_coef=0\.1: ppo\.kl\.kind=adaptive steers one",
        ),
        (
            [
                *("data.source=files", "data.prompts=p", "data.demonstrations=d", "data.comparisons=mine.jsonl"),
                "rm.ranking.labeler=vader",
            ],
            r"data\.comparisons=mine\.jsonl, but rm\.ranking\.labeler=vader has the policy's own samples ranked in",
        ),
        (
            ["weights.kv=keep", "weights.running=abort"],
            r"weights\.kv=keep, but weights\.running=abort leaves no response to keep it for; use weights\.kv=re",
        ),
        (
            ["ppo.result=ema", "ppo.ema_decay=0.9", "ppo.max_staleness=1", "evaluation.every=5"],
            r"evaluation\.every=5 samples from the average \(ppo\.result=ema\), and with ppo\.max_staleness=1 batches",
        ),
        (
            [
                *("ppo.guardrails.kl={limit: 9, action: rollback}", "ppo.save_every=1"),
                *("ppo.keep_checkpoints=2", "ppo.max_staleness=1"),
            ],
            r"keep_checkpoints=2, ppo\.save_every=1: with ppo\.max_staleness=1 the policy .* may be gone; keep more",
        ),
        (
            ["sft.pretraining_share=0.1", "ppo.ptx.tokens=1", "data.pretraining=x"],
            r"ppo\.ptx\.tokens=1: an example of one token has nothing to predict",
        ),
        (["ppo.critic_warmup=1000"], r"ppo\.critic_warmup=1000 leaves none of ppo\.steps=100 to the policy"),
        (
            ["sft.pretraining_share=0.1", "sft.batch_size=4", "data.pretraining=x"],
            r"0\.1 of a step of 4 sequences is less",
        ),
        (["stages=[sft]", "sft.select=reward", "reward.parts=[{kind: modle}]"], r"reward\.parts\[0\]\.kind=modle"),
        (
            ["data.heldout_comparisons=a.jsonl"],
            r"a\.jsonl goes with rankings of a file: give data=files and data\.comp",
        ),
        (["ppo.guardrails.max_skips=0"], r"ppo\.guardrails\.max_skips=0: it must be at least 1"),
        (
            ["reward.parts=[{kind: regex, pattern: a}, {kind: exact}, {kind: length}]", "cluster.call_timeout_s=60"],
            r"reward\.deadline_s=10: a part has 7\.5 s for all samples that come at once \(cluster\.call",
        ),
        (["ppo.guardrails.length.limit=0.5"], r"ppo\.guardrails\.length\.limit=0\.5: a factor above 1, or 0 for none"),
        (["ppo.guardrails.kl.limit=5", "kl=none"], r"kl\.limit=5\.0, but ppo\.kl\.kind=none starts no reference"),
        (["ppo.guardrails.entropy.limit=-1"], r"entropy\.limit=-1\.0: it must not be negative"),
    ],
)
def test_a_rail_that_cannot_hold_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(overrides)


def test_instructgpts_recipes_have_the_papers_numbers() -> None:
    """Appendix C of arXiv:2203.02155."""
    paths = [*ANY_PATHS, "data.pretraining=x"]
    for size, lr in (("1b", 5e-6), ("6b", 1.04e-5)):
        cfg = load([f"recipe=instructgpt_{size}", *paths])
        ppo, sft = cfg.ppo, cfg.sft
        assert (ppo.steps * ppo.batch_size, ppo.batch_size // ppo.minibatch_size, ppo.epochs) == (256_000, 8, 1)
        assert (ppo.kl.coef, ppo.ptx.coef, ppo.ptx.ratio, ppo.ema_decay, ppo.clip) == (0.02, 27.8, 8, 0.992, 0.2)
        assert (sft.epochs, sft.batch_size, sft.pretraining_share, sft.optimizer.lr) == (2, 32, 0.1, lr)
        assert (cfg.rm.batch_size, cfg.rm.optimizer.lr, cfg.rm.epochs) == (64, 9e-6, 1)
        assert all(tuple(o.betas) == (0.9, 0.95) for name, o in optimizers(cfg) if name != "dpo.optimizer")
        baseline = load([f"recipe=instructgpt_{size}_sft", *paths]).sft
        found = (baseline.epochs, baseline.dropout, baseline.optimizer.lr, baseline.select)
        assert found == (16, 0.2, 9.65e-6, "reward")


def test_the_recipe_of_summaries_has_its_papers_numbers() -> None:
    """arXiv:2403.17031, and the defaults of its code."""
    cfg = load(["recipe=summarize_from_feedback", *ANY_PATHS])
    ppo, of_stage = cfg.ppo, dict(optimizers(cfg))
    assert (cfg.sft.batch_size, cfg.rm.batch_size, ppo.batch_size, ppo.minibatch_size) == (128, 64, 512, 512)
    assert (cfg.sft.epochs, cfg.rm.epochs, ppo.epochs, ppo.steps) == (1, 1, 4, 1_000_000 // 512)
    assert (ppo.kl.coef, ppo.clip, ppo.value_clip, ppo.value_coef, ppo.advantage.lam) == (0.05, 0.2, 0.2, 0.1, 0.95)
    assert (ppo.missing_eos, ppo.missing_eos_penalty, cfg.generation.temperature) == ("replace", 1.0, 0.7)
    for name in ("sft.optimizer", "rm.optimizer", "learner.policy", "learner.critic"):
        one = of_stage[name]
        assert (one.lr, one.eps, one.weight_decay, one.max_grad_norm, one.final_lr_ratio) == (3e-6, 1e-5, 0.01, 0, 0)
        assert one.schedule == ("linear" if name.startswith("learner") else "cosine")


def test_the_loop_knows_the_actions_that_the_config_allows() -> None:
    assert RAIL_ACTIONS == ACTIONS

"""The commands as a person types them: the three stages, Ctrl-C anywhere, the same command again, and what comes after.

`smoke` is the recipe of the tiny model; one finished run of it serves most tests here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from as_user import Ended, User
from ray_head import Head
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_cluster.data.readers import read_rows
from rlhf_cluster.storage.checkpoints import Checkpoints
from rlhf_cluster.telemetry.metrics import read_metrics

SMOKE = ("run", "recipe=smoke")
FINISHED = ("stages", "checkpoints", "rollouts", "config", "comparison.json", "samples.jsonl")


@pytest.fixture(scope="module")
def smoke(user: User, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    directory = tmp_path_factory.mktemp("smoke") / "run"
    return directory, user.types(*SMOKE, f"dir={directory}")


def iterations(directory: Path, stage: str) -> list[tuple[int, Any]]:
    """(step, metrics) of each iteration; what is said of a whole stage has no time of an iteration."""
    records = [r for r in read_metrics(directory / "metrics.jsonl") if r.stage == stage]
    return [(r.step, r.metrics) for r in records if "timing_s/step" in r.metrics]


def half_written(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if ".tmp-" in path.name or ".old-" in path.name]


def require_clean(user: User, directory: Path) -> None:
    """Nothing half-written, no process, no shared memory."""
    assert not half_written(directory)
    assert not user.left_behind()
    assert not list(Path("/dev/shm").glob("rlhf-cluster-smoke*"))


def require_complete(directory: Path, steps: int = 3) -> None:
    """A run of the three stages that has everything a person was promised."""
    for stage in ("sft", "rm"):
        assert [step for step, _ in iterations(directory, stage)] == list(
            range(1, len(iterations(directory, stage)) + 1)
        )
    assert [step for step, _ in iterations(directory, "ppo")] == list(range(1, steps + 1))
    assert "<html" in (report := (directory / "report.html").read_text())
    for curve in ("Score", "Gold score", "KL from", "Entropy", "Response length", "Seconds by part"):
        assert f"<h3>{curve}" in report
    comparison = json.loads((directory / "comparison.json").read_text())
    assert comparison["prompts"] == 8 and comparison["kl_mean"] is not None
    records = read_metrics(directory / "metrics.jsonl")
    evaluated = {record.step: record.metrics["eval/gold"] for record in records if "eval/gold" in record.metrics}
    assert list(evaluated) == list(range(steps + 1))
    assert (evaluated[0], evaluated[steps]) == pytest.approx((comparison["before_mean"], comparison["after_mean"]))
    checkpoint = Checkpoints(directory / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step == steps
    Checkpoints(directory / "checkpoints").verify(checkpoint)
    for policy in (directory / "stages" / "sft" / "policy", checkpoint.path / "policy"):
        assert AutoModelForCausalLM.from_pretrained(policy).config.vocab_size > 256
    for step in range(steps):
        rollouts = pq.read_table(directory / "rollouts" / f"step-{step}.parquet")
        assert rollouts.num_rows == 8 and set(rollouts.column("step").to_pylist()) == {step}


def test_three_stages_by_one_command(smoke: tuple[Path, Ended], user: User) -> None:
    directory, ended = smoke
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("smoke: sft, rm, ppo in ")  # and no library spoke before
    for words in ("sft: ended at 5/5", "rm: ended at 3/3", "ppo: ended at 3/3", "Before, after: 8 held-out prompts"):
        assert words in ended.out
    require_complete(directory)
    require_clean(user, directory)


@pytest.mark.long
def test_the_same_command_again_finds_everything_done(smoke: tuple[Path, Ended], user: User) -> None:
    directory, first = smoke
    assert first.code == 0
    before = contents(directory)
    metrics = (directory / "metrics.jsonl").read_bytes()
    ended = user.types(*SMOKE, f"dir={directory}")
    assert (ended.code, ended.err) == (0, "")
    assert re.fullmatch(rf"{directory} holds this run, finished: .*\n", ended.out)
    assert contents(directory) == before
    assert (directory / "metrics.jsonl").read_bytes() == metrics
    require_clean(user, directory)


def contents(directory: Path) -> dict[str, bytes]:
    """What a finished run must keep, byte by byte."""
    paths = [path for name in FINISHED for path in (directory / name, *(directory / name).rglob("*"))]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.long
def test_another_config_in_the_same_directory_is_refused(smoke: tuple[Path, Ended], user: User) -> None:
    ended = user.types(*SMOKE, f"dir={smoke[0]}", "ppo.steps=4")
    assert ended.code == 2
    assert re.fullmatch(
        r"rlhf-cluster: .* holds a run with another config \(here: ppo\.steps=4, was \d+\).*\n", ended.err
    )


INTERRUPTED_AT = ("sft: 5 iterations", "ranking: ", "rm: 3 iterations", "ppo: starting", "ppo 2/3")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ctrl_c_in_every_stage_and_the_same_command_goes_on(user: User, tmp_path: Path) -> None:
    """One run, interrupted once in each stage, each time by the same command that then completes."""
    command = (*SMOKE, f"dir={tmp_path / 'run'}")
    for words in INTERRUPTED_AT:
        with user.starts(*command) as started:
            started.until(words)
            if words.endswith("iterations"):
                time.sleep(6)  # into the start of the stage's workers, which has no words of its own
            started.interrupt()
            ended = started.end()
        assert (ended.code, ended.err) == (130, "interrupted; the same command continues from what is finished\n")
        require_clean(user, tmp_path / "run")
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step >= 1
    ended = user.types(*command)
    assert (ended.code, ended.err) == (0, "")
    assert f"ppo: continues from the checkpoint of iteration {checkpoint.step}" in ended.out
    require_complete(tmp_path / "run")
    require_clean(user, tmp_path / "run")


@pytest.mark.long
def test_a_killed_driver_takes_its_workers_along_and_the_same_command_goes_on(user: User, tmp_path: Path) -> None:
    command = (*SMOKE, f"dir={tmp_path / 'run'}", "stages=[ppo]", "reward=random", "ppo.steps=6")
    with user.starts(*command) as started:
        started.until("ppo 3/6")
        started.process.kill()
        started.end()
    assert not user.left_behind()
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint is not None and checkpoint.step >= 2
    ended = user.types(*command)
    assert (ended.code, ended.err) == (0, "")
    assert f"ppo: continues from the checkpoint of iteration {checkpoint.step}" in ended.out
    steps = [record.step for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record.step]
    assert sorted(set(steps)) == list(range(1, 7)) and steps.count(3) == 1
    require_clean(user, tmp_path / "run")


@pytest.mark.long
def test_a_signal_to_the_whole_group_leaves_no_engine_behind(user: User, tmp_path: Path) -> None:
    """A terminal that closes, a batch system's stop: Ray ends before its driver, and vLLM's engine is a child of
    neither."""
    with user.starts(*SMOKE, f"dir={tmp_path / 'run'}", "stages=[ppo]", "reward=random") as started:
        started.until("ppo: starting")
        deadline = time.monotonic() + 120
        while not user.processes("EngineCore") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert user.processes("EngineCore")
        started.terminate()
        assert started.end().code != 0
    assert not user.left_behind()


@pytest.mark.long
def test_a_talk_of_two_turns(smoke: tuple[Path, Ended], user: User) -> None:
    ended = user.talks("chat", str(smoke[0]), "--max-tokens", "4", lines="Hello.\nAnd now?\n")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("an empty line ends the talk\n> ")
    assert ended.out.count("> ") == 3


@pytest.mark.long
def test_prompts_of_a_file_are_answered_in_its_order(smoke: tuple[Path, Ended], user: User, tmp_path: Path) -> None:
    """A prompt that stands there twice is answered twice."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Zebra?", "Ape?", "Zebra?", "Cow?")))
    ended = user.types("generate", str(smoke[0]), str(file), "--output", str(tmp_path / "answers.jsonl"))
    said = f"4 answers in {tmp_path / 'answers.jsonl'}\n"
    assert (ended.code, ended.out, ended.err) == (0, said, "")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [row.values["prompt"] for row in read_rows(file)]
    assert {answer["finish_reason"] for answer in answers} <= {"stop", "length"}
    assert all(set(answer) == {"prompt", "response", "finish_reason"} for answer in answers)
    assert not user.left_behind()


@pytest.mark.long
def test_a_random_reward_and_no_network_but_the_loopback(smoke: tuple[Path, Ended], user: User, tmp_path: Path) -> None:
    """The control's reward, in a network namespace with nothing but `lo`."""
    alone = ("unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("a network namespace cannot be made here: it takes root, `unshare` and `ip`")
    policy = smoke[0] / "stages" / "sft" / "policy"
    asked = (*SMOKE, f"dir={tmp_path / 'run'}", "stages=[ppo]", f"policy_path={policy}", "ppo.steps=1")
    ended = user.types(*asked, "reward=random", before=alone, HF_HUB_OFFLINE="0")
    assert (ended.code, ended.err) == (0, "")
    ((_, metrics),) = iterations(tmp_path / "run", "ppo")
    assert metrics["critic/score/max"] > metrics["critic/score/min"]
    require_clean(user, tmp_path / "run")


@pytest.mark.long
def test_without_a_penalty_there_is_no_reference_worker(smoke: tuple[Path, Ended], user: User, tmp_path: Path) -> None:
    stages = smoke[0] / "stages"
    paths = (f"policy_path={stages / 'sft' / 'policy'}", f"reward.path={stages / 'rm' / 'reward_model'}")
    ahead = ("ppo.steps=3", "ppo.max_staleness=1")  # one step off, on real rooms
    ended = user.types(*SMOKE, f"dir={tmp_path / 'run'}", "stages=[ppo]", *paths, *ahead, "kl=none")
    assert (ended.code, ended.err) == (0, "")
    assert not list((tmp_path / "run").rglob("reference*"))
    assert "ref_logprobs" not in pq.read_table(tmp_path / "run" / "rollouts" / "step-1.parquet").column_names
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["kl_mean"] is None
    for _, metrics in iterations(tmp_path / "run", "ppo"):
        assert metrics["objective/rlhf_reward"] == pytest.approx(metrics["objective/scores"], abs=1e-5)
        assert 0 <= metrics["rollout/staleness"] <= 1
    require_clean(user, tmp_path / "run")


def own_versions(run: Path, step: int) -> set[int]:
    column = pq.read_table(run / "rollouts" / f"step-{step}.parquet").column("weight_versions")
    return {version for versions in column.to_pylist() for version in versions}


FAILING = """
def score(samples):
    if any(sample.sample_id.startswith("1/") and sample.sample_id.endswith("/2") for sample in samples):
        raise ValueError("not this one")
    return [sum(letter in "aeiou" for letter in sample.response) / 16 for sample in samples]
"""


@pytest.mark.long
def test_no_critic_no_reward_model_and_a_reward_that_fails(user: User, tmp_path: Path) -> None:
    """What the smoke run leaves out: an epoch of SFT chosen by score, DPO and GRPO on two ranks each, adapters, an
    average as the result, and a function that fails a response of every prompt of the second iteration."""
    (tmp_path / "mine.py").write_text(FAILING)
    two = ("dpo.resources.workers=2", "dpo.engine.zero_stage=2", "learner.resources.workers=2")
    adapters = ("learner.lora.rank=4", "learner.lora.publish=adapter")
    asked = (
        *("stages=[sft,dpo,ppo]", "sft.epochs=2", "sft.select=reward", "dpo.batch_size=4"),
        *("advantage=grpo", "ppo.samples_per_prompt=4", "ppo.ema_decay=0.5", "ppo.result=ema", "evaluation.every=1"),
        f"reward.parts=[{{kind: function, path: {tmp_path / 'mine.py'}:score}}, {{kind: length, weight: -0.01}}]",
    )
    ended = user.types(*SMOKE, f"dir={tmp_path / 'run'}", *asked, *two, *adapters)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"sft: the policy of epoch [12] goes on; mean scores by epoch: 1: [+-][\d.]+, 2: [+-]", ended.out)
    assert "iteration 2: samples failed and were not trained on: 2 x function: it raised ValueError: not this one" in (
        " ".join(ended.out.split())
    )
    assert not (tmp_path / "run" / "stages" / "sft-epochs").exists()
    after = pq.read_table(tmp_path / "run" / "heldout_after.parquet").column("weight_versions").to_pylist()
    assert {version for versions in after for version in versions} == {4}, "the average, not the policy of iteration 3"
    for step, trained in enumerate(iterations(tmp_path / "run", "ppo")):
        states = pq.read_table(tmp_path / "run" / "rollouts" / f"step-{step}.parquet").column("state").to_pylist()
        assert sorted(states) == ["dropped"] * (8 if step == 1 else 0) + ["trained"] * 8
        assert own_versions(tmp_path / "run", step) == {step}, "an average was evaluated in between, and left again"
        assert not any(name.startswith("critic/v") for name in trained[1])
        assert {"reward/function", "reward/length", "actor/kl_loss"} <= trained[1].keys()
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Guardrails and rewards" in report and "it raised ValueError: not this one" in report
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert checkpoint is not None
    assert {path.name for path in checkpoint.path.iterdir() if path.is_dir()} == {"policy", "ema", "adapter", "state"}
    weights = [AutoModelForCausalLM.from_pretrained(checkpoint.path / name).state_dict() for name in ("policy", "ema")]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    answered = user.talks("chat", str(tmp_path / "run"), "--max-tokens", "4", lines="Hello.\n")
    assert answered.code == 0, answered.err
    require_clean(user, tmp_path / "run")


@pytest.mark.long
def test_a_run_that_a_guardrail_stops_says_why_and_reports(
    smoke: tuple[Path, Ended], user: User, tmp_path: Path
) -> None:
    paths = (f"policy_path={smoke[0] / 'stages' / 'sft' / 'policy'}", "reward=random")
    rail = "ppo.guardrails.entropy={limit: 99, action: stop}"
    ended = user.types(*SMOKE, f"dir={tmp_path / 'run'}", "stages=[ppo]", *paths, rail)
    assert ended.code == 1
    assert re.match(r"rlhf-cluster: iteration 1 was stopped by ppo\.guardrails \(entropy: [\d.]+ nats per", ended.err)
    assert ended.err.count("\n") == 1
    report = (tmp_path / "run" / "report.html").read_text()
    assert re.search(r'<td>entropy</td><td class="words">stop</td><td>[\d.]+</td><td>1</td>', report)
    assert not (tmp_path / "run" / "comparison.json").exists()
    require_clean(user, tmp_path / "run")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers: absolute positions, a byte tokenizer without pad token and template."""
    directory = tmp_path_factory.mktemp("models") / "gpt2"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert tokenizer.pad_token is None and tokenizer.chat_template is None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eos, sizes = tokenizer.eos_token_id, {"n_positions": 320, "n_embd": 128, "n_layer": 2, "n_head": 4}
        config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **sizes)
        GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.long
def test_a_gpt2_goes_through_the_three_stages(gpt2: Path, user: User, tmp_path: Path) -> None:
    """SFT and the reward model on two ranks each."""
    two = ("sft.resources.workers=2", "rm.resources.workers=2", "sft.engine.zero_stage=3", "rm.engine.zero_stage=2")
    asked = ("model=pretrained", f"model.path={gpt2}", "model.dtype=float32", "ppo.steps=2", *two)
    ended = user.types(*SMOKE, f"dir={tmp_path / 'run'}", *asked)
    assert (ended.code, ended.err) == (0, "")
    require_complete(tmp_path / "run", steps=2)
    for _, metrics in iterations(tmp_path / "run", "ppo"):
        assert metrics["rollout/logprob_diff_max"] < 1e-4
        assert metrics["actor/first_ratio_max"] == pytest.approx(1, abs=1e-5)
    require_clean(user, tmp_path / "run")


@pytest.mark.long
def test_a_run_is_submitted_followed_asked_after_and_stopped(head: Head, user: User, tmp_path: Path) -> None:
    def job(verb: str, *arguments: str) -> Ended:
        return user.types(verb, *arguments, "--address", head.address, RAY_AUTH_TOKEN=head.token)

    sent = ("recipe=smoke", "ppo.steps=1")
    ended = job("submit", *sent, f"dir={tmp_path / 'whole'}", "--id", "whole")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("submitted whole\n") and "ppo: ended at 1/1" in ended.out
    require_complete(tmp_path / "whole", steps=1)
    assert job("status", "whole").out.startswith("SUCCEEDED")
    assert "ppo: ended at 1/1" in job("logs", "whole").out

    assert job("submit", *sent, f"dir={tmp_path / 'cut'}", "--id", "cut", "--detach").out == "submitted cut\n"
    deadline = time.monotonic() + 120
    while "sft: 5 iterations" not in job("logs", "cut").out:
        assert time.monotonic() < deadline
    stopped = job("stop", "cut")
    assert (stopped.code, stopped.out) == (0, "STOPPED\n")
    assert "interrupted; the same command continues" in job("logs", "cut").out
    assert not half_written(tmp_path / "cut")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 30 MB: two of three checkpoints fit."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system to fill")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_full_disk_is_said_and_what_was_complete_stays(small_disk: Path, user: User) -> None:
    command = (*SMOKE, f"dir={small_disk / 'run'}", "model.dtype=float32")  # sizes that no machine changes
    ended = user.types(*command)
    assert ended.code == 1
    assert re.fullmatch(r"rlhf-cluster: the disk is full: .*could not take the checkpoint of step \d.*\n", ended.err)
    require_clean(user, small_disk / "run")
    checkpoints = Checkpoints(small_disk / "run" / "checkpoints")
    latest = checkpoints.latest()
    assert latest is not None
    checkpoints.verify(latest)
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    ended = user.types(*command)
    assert (ended.code, ended.err) == (0, "")
    assert f"ppo: continues from the checkpoint of iteration {latest.step}" in ended.out
    require_complete(small_disk / "run")

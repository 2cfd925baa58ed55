"""rlhf-cluster COMMAND: what a person types. Parses, calls one function of the package, and turns errors into a
sentence and an exit code: 0 done, 1 failed, 2 refused before anything started, 130 interrupted."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from rlhf_cluster.config import ConfigError, RewardPart, RunConfig, load, load_file, part_names, to_yaml
from rlhf_cluster.interrupts import first_cause, heed_sigterm

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
RUN_DIR = "the directory of a run, as runs/quickstart"
DATA_FILES = ("path", "prompts", "demonstrations", "comparisons", "heldout_comparisons", "pretraining")


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point of the console script."""
    args = parse(arguments)
    # DeepSpeed compiles with the ninja that is installed beside us, which is not on PATH unless the venv is activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    heed_sigterm()
    try:
        return int(args.command(args) or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is finished", file=sys.stderr)
        return INTERRUPTED
    except refusals() as error:
        print(f"rlhf-cluster: {error}", file=sys.stderr)
        return REFUSED
    except Exception as error:
        if args.traceback:
            raise
        cause = first_cause(error)
        # Our own errors are sentences; for a library's, where it came from may help.
        hint = "" if type(cause).__module__.startswith("rlhf_cluster") else " (--traceback shows where)"
        print(f"rlhf-cluster: {str(cause) or type(cause).__name__}{hint}", file=sys.stderr)
        return FAILED


def refusals() -> tuple[type[Exception], ...]:
    """Errors that speak of the input: nothing was started."""
    from rlhf_cluster.data.rows import DataError
    from rlhf_cluster.models import ModelError

    return ConfigError, DataError, ModelError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand on both sides of an option, which argparse does not allow below a subcommand."""
    args, left = parser().parse_known_args(arguments)
    if any(text.startswith("-") or "overrides" not in args for text in left):
        parser().error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.overrides += left
    return args


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="rlhf-cluster", description="InstructGPT's three steps as a distributed system.")
    top.add_argument("--version", action="version", version=f"rlhf-cluster {version('rlhf-cluster')}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    for name, function, text in (
        ("run", run, "run the stages of a config, here"),
        ("config", show_config, "print the resolved config and start nothing"),
    ):
        _config_arguments(command(name, function, text))
    data = command("data", data_check, "say what a data file is and what would be dropped")
    data.add_argument("action", choices=["check"])
    data.add_argument("path", help="a file, a directory of shards, or a dataset directory")
    data.add_argument("--model", help="tokenizer for token lengths: a Hugging Face directory")
    chat = command("chat", chat_with, "talk to the result of a run in the terminal")
    chat.add_argument("run_dir", type=Path, help=RUN_DIR)
    chat.add_argument("--max-tokens", type=int, default=128, help="of an answer; default: 128")
    chat.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token; default: 1")
    generate = command("generate", generate_file, "answer the prompts of a file with the result of a run")
    generate.add_argument("run_dir", type=Path, help=RUN_DIR)
    generate.add_argument("prompts", type=Path, help="a file of rows with a prompt, as for data.prompts")
    generate.add_argument("--output", type=Path, help="jsonl to write; default: the terminal")
    generate.add_argument("--overwrite", action="store_true", help="write over what --output names")
    generate.add_argument("--max-tokens", type=int, help="of an answer; default: the run's max_response_tokens")
    generate.add_argument("--temperature", type=float, help="0: always the likeliest token; default: the run's")
    submission = command("submit", submit, "send a config to a running cluster as a Ray job and follow it")
    _config_arguments(submission)
    submission.add_argument("--id", default="", help="the job's id; default: one that Ray makes")
    submission.add_argument("--detach", action="store_true", help="do not follow the job's output")
    _address(submission)
    for name, text in (
        ("status", "the state of a submitted job"),
        ("logs", "what a submitted job has printed so far"),
        ("stop", "end a submitted job; its last checkpoint stays"),
    ):
        job = command(name, about_job, text)
        job.add_argument("job_id")
        job.set_defaults(verb=name)
        _address(job)
    tuning = command("tune", tune, "say what a run's workers waited for, and propose a better split of them")
    tuning.add_argument("run_dir", type=Path, help=f"{RUN_DIR}, with a few iterations of PPO")
    tuning.add_argument("--cpus", type=float, default=0.0, help="cores that there are; default: those of the run")
    tuning.add_argument("--gpus", type=float, default=0.0, help="GPUs that there are; default: those of the run")
    scaling = command("scale", scale, "change the pools of a run while it goes on")
    scaling.add_argument("run_dir", type=Path, help=RUN_DIR)
    scaling.add_argument("pools", nargs="+", metavar="POOL=NUMBER", help="generation=4 reward=1 reference=1")
    scaling.add_argument("--wait", type=float, default=900.0, help="seconds for it to be done; default: 900")
    command("doctor", doctor, "check this machine and say how to mend what is wrong")
    return top


def _address(sub: argparse.ArgumentParser) -> None:
    default = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    sub.add_argument("--address", default=default, help="the head node's dashboard, http://HOST:8265")


def _config_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--stage", help="the primary config: pipeline (the default), sft, rm, dpo or ppo")
    sub.add_argument("--config", type=Path, help="a resolved config file instead of overrides")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe=quickstart ppo.kl.coef=0.05 ...")


def config_of(args: argparse.Namespace) -> RunConfig:
    if args.config is None:
        return load(args.overrides, args.stage or "pipeline")
    if args.overrides or args.stage:
        others = [*args.overrides, *([f"--stage {args.stage}"] if args.stage else [])]
        raise ConfigError(f"--config {args.config} is resolved already; leave out {' '.join(others)}")
    return load_file(args.config)


def run(args: argparse.Namespace) -> None:
    cfg = config_of(args)
    from rlhf_cluster.telemetry.quiet import quiet_libraries

    quiet_libraries()
    from rlhf_cluster import pipeline

    pipeline.run(cfg, args.overrides)


def tune(args: argparse.Namespace) -> None:
    from rlhf_cluster.planning import tune as planning

    planning.show(planning.tune(args.run_dir, args.cpus, args.gpus))


def scale(args: argparse.Namespace) -> None:
    from rlhf_cluster.cluster import scaling

    print(scaling.ask(args.run_dir, scaling.parse(args.pools), args.wait))


def submit(args: argparse.Namespace) -> int:
    from rlhf_cluster.cluster import jobs
    from rlhf_cluster.telemetry.quiet import quiet_libraries

    quiet_libraries()  # after the import, with which Ray sets its loggers to INFO
    job_id = jobs.submit(to_yaml(for_cluster(config_of(args))), args.address, args.id)
    print(f"submitted {job_id}")
    return 0 if args.detach else jobs.follow(job_id, args.address)


def file_of(part: RewardPart) -> str:
    """The file or directory that a reward's part reads, if it reads one."""
    return {
        "model": part.path,
        "json_schema": part.schema,
        "function": part.path if ".py:" in part.path else "",
    }.get(part.kind, "")


def for_cluster(cfg: RunConfig) -> RunConfig:
    """The config of a job: it attaches to the cluster that runs it, and its paths must not depend on a directory that
    Ray throws away."""
    if cfg.cluster.address == "local":
        cfg.cluster.address = "auto"
    if not cfg.dir:
        raise ConfigError("dir is empty; a submitted run needs dir=/an/absolute/path on storage that its nodes share")
    must = {
        "dir": cfg.dir,
        "policy_path": cfg.policy_path,
        "reward.path": cfg.reward.path,
        "reference.path": cfg.reference.path,
        **{f"data.{name}": getattr(cfg.data, name) for name in DATA_FILES},
        **{f"the reward {name}'s path": file_of(part) for name, part in part_names(cfg.reward).items()},
    }
    if Path(cfg.model.path).is_dir():  # not a hub id
        must["model.path"] = cfg.model.path
    for key, path in must.items():
        if path and not Path(path).is_absolute():
            raise ConfigError(f"{key}={path} is a relative path; a submitted run needs an absolute one")
    return cfg


def about_job(args: argparse.Namespace) -> None:
    from rlhf_cluster.cluster import jobs

    said = {"status": jobs.status, "logs": jobs.logs, "stop": jobs.stop}[args.verb](args.job_id, args.address)
    print(said.rstrip("\n"))


def show_config(args: argparse.Namespace) -> None:
    print(to_yaml(config_of(args)), end="")


def data_check(args: argparse.Namespace) -> int:
    from rlhf_cluster.data.check import check
    from rlhf_cluster.models.tokenizer import load_tokenizer

    if not args.path:
        raise ConfigError("the path is empty; name a file, a directory of shards or a pattern")
    report = check(args.path, load_tokenizer(Path(args.model)) if args.model else None)
    print(report)
    return 0 if report.accepted else REFUSED


def chat_with(args: argparse.Namespace) -> None:
    from rlhf_cluster.chat import chat
    from rlhf_cluster.results import result_policy

    chat(result_policy(args.run_dir), args.max_tokens, args.temperature)


def generate_file(args: argparse.Namespace) -> None:
    from rlhf_cluster.telemetry.quiet import quiet_libraries

    quiet_libraries()
    from rlhf_cluster.generate import generate

    answered = generate(args.run_dir, args.prompts, args.output, args.overwrite, args.max_tokens, args.temperature)
    if args.output:
        print(f"{answered} answers in {args.output}")


def doctor(args: argparse.Namespace) -> int:
    from rlhf_cluster.doctor import run_doctor

    return run_doctor()


if __name__ == "__main__":
    sys.exit(main())

"""From `conf/` and overrides to the typed tree and back to YAML: the one door to Hydra and OmegaConf."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_cluster.config.refusal import ConfigError
from rlhf_cluster.config.tree import RunConfig, leaves
from rlhf_cluster.config.validation import validate

PACKAGE = Path(__file__).parents[1]
PACKAGE_HEADER = re.compile(r"^# @package (\S+)")


def conf_directory() -> Path:
    """`conf/` beside the package in a checkout, inside it in an installed wheel."""
    shipped = PACKAGE / "conf"
    return shipped if shipped.is_dir() else PACKAGE.parent / "conf"


def load(overrides: Sequence[str], config_name: str = "pipeline") -> RunConfig:
    """Composes `conf/<config_name>.yaml` with Hydra overrides, and validates. Raises ConfigError, a single sentence.

    Whoever names a choice of a group means it: it wins over the recipe, and single keys win over both.
    """
    if not (conf_directory() / f"{config_name}.yaml").is_file():
        raise ConfigError(f"there is no stage {config_name!r}; there are {', '.join(_choices('.'))}")
    _store_schema()
    parsed = [*map(_parsed, overrides)]
    _check_keys(parsed)
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            tree = compose(config_name, overrides=list(overrides))
        cfg = OmegaConf.to_object(_with_choices_named(tree, parsed))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_sentence(error)) from error
    return validate(cfg)


def load_file(path: Path) -> RunConfig:
    """A resolved config that `to_yaml` wrote (a submitted job, a resumed run)."""
    wanted = "a resolved config is wanted, as `rlhf-cluster config` prints it and a run keeps it"
    try:
        tree = OmegaConf.load(path)
        if not tree:
            raise ConfigError(f"{path} is empty; {wanted}")
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), tree))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line} is not YAML; {wanted}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_sentence(error)}; {wanted}") from error
    return validate(cfg)


def to_yaml(cfg: RunConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def differences(cfg: RunConfig, before: RunConfig) -> list[str]:
    """`key=value, was value` of every key of `cfg` that makes it another run than `before`.

    Where a run lies, how it is shown, on how much it computes, its limits and its patience may change when it goes on:
    a training state opens on any number of workers, and what stopped a run can be mended.
    """
    may_change = re.compile(
        r"dir|resume|ppo\.(save_every|keep_checkpoints|empty_wait_s|guardrails\..*)|(logging|cluster)\..*"
        r"|reward\.(deadline_s|retries|backoff_s|breaker_failures|breaker_s|batch_size|concurrency|token_env)"
        r"|.*\.resources\..*|.*\.(tokens_per_micro_batch|zero_stage|offload_optimizer|activation_checkpointing)"
        r"|learner\.(packing|min_workers|keep_state_every)|generation\.(max_num_seqs|kv_cache_memory|gpu_memory_share|flush_ms)"
    )
    old = dict(leaves(before))
    changed = [(key, new) for key, new in leaves(cfg) if new != old[key] and not may_change.fullmatch(key)]
    return [f"{key}={_short(new)}, was {_short(old[key])}" for key, new in changed]


@functools.cache
def _store_schema() -> None:
    """What the primary configs have as their first default."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_directory() / group).glob("*.yaml"))


def _groups() -> set[str]:
    return {path.name for path in conf_directory().iterdir() if path.is_dir()}


def _with_choices_named(tree: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """Hydra composes the recipe after all groups, so it would win over a choice that was named beside it. A named `kl`
    wins over that of a named `advantage`."""
    groups = _groups()
    choices = [one for one in overrides if one.key_or_group in groups - {"recipe"} and isinstance(one.value(), str)]
    choices.sort(key=lambda choice: choice.key_or_group == "kl")
    for choice in choices:
        path = conf_directory() / choice.key_or_group / f"{choice.value()}.yaml"
        package = PACKAGE_HEADER.search(path.read_text())
        OmegaConf.update(tree, package[1] if package else choice.key_or_group, OmegaConf.load(path), merge=True)
    for override in overrides:
        if override.key_or_group not in groups:
            OmegaConf.update(tree, override.key_or_group, override.value(), merge=True)
    return tree


def _check_keys(overrides: Sequence[Override]) -> None:
    """Unknown keys and choices get a better sentence than Hydra's: the nearest known ones."""
    groups = _groups()
    keys = dict(leaves(RunConfig()))
    sections = {".".join(parts[:depth]) for parts in (key.split(".") for key in keys) for depth in range(1, len(parts))}
    for key, value in (told for one in overrides for told in _flat(one.key_or_group, one.value(), sections)):
        if key in groups:
            if not isinstance(value, dict) and value not in _choices(key):
                raise ConfigError(f"{key}={value}: there is no such {key}; there are {', '.join(_choices(key))}")
            continue
        if key in sections:
            within = [name for name in keys if name.startswith(f"{key}.")]
            raise ConfigError(f"{key}={value}: {key} is a section; set a key of it, as {within[0]}")
        if key not in keys:
            near = _nearest(key, keys)
            raise ConfigError(f"unknown key {key!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        if isinstance(known := keys.get(key), list | tuple):
            _check_list(key, value, known)


def _check_list(key: str, value: object, known: Sequence[object]) -> None:
    """`known`: its default. A list of sections is told from it, since only the first of its words would be Hydra's."""
    section = vars(known[0]) if known and is_dataclass(known[0]) else {}
    first = next(iter(section), "")
    if not isinstance(value, list):
        example = f"{{{first}: {value}}}" if section else value
        raise ConfigError(f"{key}={value}: it must be a list, as {key}=[{example}]")
    for index, one in enumerate(value if section else ()):
        where = f"{key}[{index}]"
        if not isinstance(one, dict):
            raise ConfigError(f"{where}={one}: it must be a section, as {{{first}: {one}}}")
        for name, inner in one.items():
            if name not in section:
                near = difflib.get_close_matches(name, section, n=1, cutoff=0.5)
                told = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(section)}"
                raise ConfigError(f"{where}: unknown key {name!r}{told}")
            if isinstance(section[name], float) and not isinstance(inner, int | float):
                raise ConfigError(f"{where}.{name}={inner}: it must be a number")


def _flat(key: str, value: object, sections: Collection[str]) -> Iterator[tuple[str, object]]:
    """`a={b: 1}` as `a.b` and 1, where a is a section."""
    if key in sections and isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(f"{key}.{name}", inner, sections)
    else:
        yield key, value


def _nearest(key: str, known: Collection[str]) -> list[str]:
    """Up to three known keys: those whose last name is this one's, or what its initials spell (learning_rate: lr), then
    those that are spelt alike."""
    last = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_")) if "_" in last else last
    named = [name for name in known if name.rpartition(".")[2] in (last, initials)]
    return list(dict.fromkeys([*named, *difflib.get_close_matches(key, known, n=3, cutoff=0.5)]))[:3]


def _parsed(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"{text!r} cannot be read; an override is KEY=VALUE, as in ppo.kl.coef=0.05, and a value with special "
            "characters is quoted, as in name='\"a b\"'"
        ) from error
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"{text!r} would add a key, but all keys are there; leave out the +")
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} names several values, but a run takes one; a list is written KEY=[1,2]")
    if override.is_delete():
        raise ConfigError(f"{text!r} would remove a key, but every key has a value; set it: KEY=VALUE")
    return override


def _one_sentence(error: Exception) -> str:
    """OmegaConf and Hydra explain in several lines; the first says what, `full_key` says where."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    where = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    return f"{where}: {lines[0]}" if where and where not in lines[0] else lines[0]

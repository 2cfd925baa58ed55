"""The rules of the house, read from the source: who may import whom, the doors of the giant libraries, and what no file
may hold. `remarks` judges any tree, so a made-up bad one proves that the test can fail."""

from __future__ import annotations

import ast
import graphlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_cluster"
LONGEST_FUNCTION = 80

# Giant library -> the rooms that may import it.
DOORS = {
    "ray": {"cluster", "serving"},
    "vllm": {"generation", "weights"},
    "deepspeed": {"engine"},
    "hydra": {"config"},
    "omegaconf": {"config"},
}
EXTRA_DOORS = {("telemetry", "ray.util.metrics")}

# Who may be imported by these; what is not listed here is bound by the other rules alone.
MAY_SEE = {
    "records": set[str](),
    "rooms": {"records"},
    "config": set[str](),
    "algo": {"records"},
    "loop": {"records", "algo"},
    "collection": {"records", "rooms", "config", "loop", "telemetry"},
    "ppo": {"records", "rooms", "config", "algo", "loop", "collection", "telemetry", "storage"},
}
SUPERVISED = MAY_SEE["ppo"] - {"loop", "collection"} | {"engine", "models", "data"}
MAY_SEE |= dict.fromkeys(("sft", "rm", "dpo"), SUPERVISED)
ROOMS = {"generation", "scoring", "reference", "learner"}
# `cluster` makes actors of the rooms; only what a person starts may start actors.
SEEN_ONLY_BY = {"cluster": {"pipeline", "cli", "generate"}, "pipeline": {"cli"}, "cli": set[str]()}

CONF_GROUPS = {
    *("model", "data", "generation", "reward", "learner", "kl", "advantage"),
    *("cluster", "weights", "logging", "recipe"),
}
PRIMARY_CONFIGS = {"sft.yaml", "rm.yaml", "dpo.yaml", "ppo.yaml", "pipeline.yaml"}


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Full dotted names, wherever the import stands: a lazy import opens a door as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def door_remarks(room: str, name: str) -> Iterator[str]:
    library = name.split(".")[0]
    extra = any(room == who and f"{name}.".startswith(f"{what}.") for who, what in EXTRA_DOORS)
    if library in DOORS and room not in DOORS[library] and not extra:
        yield f"imports {name}, whose door is {'/'.join(sorted(DOORS[library]))}"


def sight_remarks(room: str, other: str) -> Iterator[str]:
    if other not in MAY_SEE.get(room, {other}):
        yield f"{room} imports {other}; it may see {', '.join(sorted(MAY_SEE[room])) or 'nothing of ours'}"
    if room in ROOMS and other in ROOMS:
        yield f"room {room} imports room {other}"
    if room not in SEEN_ONLY_BY.get(other, {room}):
        yield f"{room} imports {other}, which is for {', '.join(sorted(SEEN_ONLY_BY[other])) or 'nobody'}"


def body_remarks(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{node.name} is {length} lines long, {LONGEST_FUNCTION} at most"
        if isinstance(node, ast.ExceptHandler) and all(is_nothing(statement) for statement in node.body):
            yield f"line {node.lineno} swallows an error"


def is_nothing(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def import_remarks(path: Path, package: Path, tree: ast.AST, seen: dict[str, set[str]]) -> Iterator[str]:
    room = room_of(path, package)
    for name in sorted(set(imported_names(tree))):
        if name.startswith("."):
            yield f"relative import {name}"
        yield from door_remarks(room, name)
        if name.startswith(f"{PACKAGE}.") and (other := name.split(".")[1]) != room and is_module(package, other):
            seen[room].add(other)
            yield from sight_remarks(room, other)


def is_module(package: Path, name: str) -> bool:
    return (package / name).is_dir() or (package / f"{name}.py").is_file()


def package_remarks(root: Path) -> Iterator[str]:
    package = root / PACKAGE
    seen: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        shown = path.relative_to(root)
        tree = ast.parse(path.read_text())
        if "util" in path.stem or any("util" in part for part in path.relative_to(package).parts[:-1]):
            yield f"{shown}: a helper with a real name has a real home"
        for remark in (*import_remarks(path, package, tree, seen), *body_remarks(tree)):
            yield f"{shown}: {remark}"
    try:
        graphlib.TopologicalSorter(seen).prepare()
    except graphlib.CycleError as error:
        yield f"imports go in a circle: {' <- '.join(error.args[1])}"


def conf_remarks(root: Path) -> Iterator[str]:
    for path in sorted((root / "conf").rglob("*")):
        parts = path.relative_to(root / "conf").parts
        if path.is_dir():
            continue
        if path.suffix != ".yaml":
            yield f"conf/{'/'.join(parts)}: only .yaml files are composed"
        elif (len(parts) == 1 and parts[0] not in PRIMARY_CONFIGS) or (len(parts) > 1 and parts[0] not in CONF_GROUPS):
            yield f"conf/{'/'.join(parts)}: neither a primary config nor in a known group"


def naming_remarks(root: Path) -> Iterator[str]:
    """pytest imports test files by their base name."""
    names = Counter(path.name for path in (root / "tests").rglob("test_*.py"))
    yield from (f"{count} test files are called {name}" for name, count in names.items() if count > 1)
    yield from (f"{path.relative_to(root)}: tests are no package" for path in (root / "tests").rglob("__init__.py"))


def remarks(root: Path) -> list[str]:
    return [*package_remarks(root), *conf_remarks(root), *naming_remarks(root)]


def test_the_house_is_in_order() -> None:
    assert remarks(ROOT) == []


def test_the_house_was_looked_at() -> None:
    """An empty tree would be in order too."""
    rooms = {path.stem for path in (ROOT / PACKAGE).iterdir()}
    assert rooms >= ROOMS | {"cluster", "records", "ppo", "sft", "rm", "pipeline", "cli"}
    assert {path.name for path in (ROOT / "conf").iterdir()} >= PRIMARY_CONFIGS | CONF_GROUPS


BAD = {
    "rlhf_cluster/algo/losses.py": "from rlhf_cluster import config\n",
    "rlhf_cluster/config.py": "",
    "rlhf_cluster/cluster/pool.py": "import ray\nfrom rlhf_cluster.scoring import worker\n",
    "rlhf_cluster/learner/worker.py": "def add():\n    import ray.util\n    from rlhf_cluster.scoring import worker\n",
    "rlhf_cluster/scoring/worker.py": "from rlhf_cluster.cluster.pool import Pool\n",
    "rlhf_cluster/telemetry/metrics.py": "from ray.util.metrics import Gauge\nfrom ray import serve\n",
    "rlhf_cluster/models/utils.py": "from . import load\n",
    "rlhf_cluster/ppo.py": "def train():\n" + "    x = 1\n" * 80,
    "rlhf_cluster/sft.py": "try:\n    x = 1\nexcept ValueError:\n    pass\n",
    "conf/optimizer/adam.yaml": "",
    "conf/ppo.yaml": "",
    "tests/unit/a/test_worker.py": "",
    "tests/unit/b/test_worker.py": "",
}

FOUND = [
    "rlhf_cluster/algo/losses.py: algo imports config; it may see records",
    "rlhf_cluster/learner/worker.py: imports ray.util, whose door is cluster/serving",
    "rlhf_cluster/learner/worker.py: room learner imports room scoring",
    "rlhf_cluster/models/utils.py: a helper with a real name has a real home",
    "rlhf_cluster/models/utils.py: relative import ..load",
    "rlhf_cluster/ppo.py: train is 81 lines long, 80 at most",
    "rlhf_cluster/scoring/worker.py: scoring imports cluster, which is for cli, generate, pipeline",
    "rlhf_cluster/sft.py: line 3 swallows an error",
    "rlhf_cluster/telemetry/metrics.py: imports ray.serve, whose door is cluster/serving",
    "conf/optimizer/adam.yaml: neither a primary config nor in a known group",
    "2 test files are called test_worker.py",
]


@pytest.fixture
def bad_house(tmp_path: Path) -> Path:
    for name, text in BAD.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_every_rule_can_be_broken(bad_house: Path) -> None:
    found = remarks(bad_house)
    circles = [remark for remark in found if remark.startswith("imports go in a circle")]
    assert len(circles) == 1
    assert "cluster" in circles[0] and "scoring" in circles[0]
    assert sorted(set(found) - set(circles)) == sorted(FOUND)

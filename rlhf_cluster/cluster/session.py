"""A connection to Ray for the length of a run: a Ray of its own on a laptop, a running cluster otherwise."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray

from rlhf_cluster.cluster.hosts import reserved, set_apart
from rlhf_cluster.config import ClusterConfig, ConfigError, Resources

GONE_S = 10  # without an answer a Ray of our own is gone


@contextmanager
def ray_session(cfg: ClusterConfig, at_once: Mapping[str, Mapping[str, Resources]]) -> Iterator[None]:
    """Connects, refuses what the cluster can never hold, and disconnects.

    `at_once` gives, for each stage, the roles that run at the same time. A local Ray starts with as many logical CPUs
    as the hungriest stage asks, since there CPUs only count workers; `threads` says what they compute with.
    """
    with _sigterm_kept():
        _connect(cfg, at_once)
    try:
        _refuse_impossible(at_once)
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """`ray.init` takes SIGTERM twice over, in Python and in native code, and both ways end the process without
    clean-up: whoever handled the signal before gets it again."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(cfg: ClusterConfig, at_once: Mapping[str, Mapping[str, Resources]]) -> None:
    cpus = max(_total(roles, "CPU") for roles in at_once.values())
    if cfg.address == "local":
        _start_local(cfg, max(int(cpus) + 2, os.cpu_count() or 1))
    else:
        ray.init(address=cfg.address, log_to_driver=False, logging_level=logging.WARNING)


def _start_local(cfg: ClusterConfig, num_cpus: int) -> None:
    # A token that lives as long as this process: nobody else on the machine may submit work to our Ray. Ray turns
    # token authentication on by itself for a local start (unless RAY_AUTH_MODE says otherwise) and would leave a token
    # file in the user's home.
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A signal to the whole process group (a terminal that closes, a batch system's stop) ends our Ray before us; what
    # we still ask of it then must not wait for a minute.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(GONE_S))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=cfg.temp_dir or None,
    )


def _total(roles: Mapping[str, Resources], kind: str) -> float:
    return sum(reserved(resources).get(kind, 0.0) * resources.workers for resources in roles.values())


def _refuse_impossible(at_once: Mapping[str, Mapping[str, Resources]]) -> None:
    """Ray would leave such actors pending for ever, without a word."""
    total = ray.cluster_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for stage, roles in at_once.items():
        for name, resources in roles.items():
            _require_a_node(name, reserved(resources) | set_apart(name), nodes)
        _require_room(stage, roles, total)


def _require_a_node(name: str, needed: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> None:
    """One worker lives on one node."""
    if not any(all(has.get(kind, 0.0) >= amount for kind, amount in needed.items()) for has in nodes):
        wish = ", ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
        raise ConfigError(
            f"a worker of {name} asks for {wish}, which none of {len(nodes)} nodes has; lower {name}.resources"
        )


def _require_room(stage: str, roles: Mapping[str, Resources], total: Mapping[str, float]) -> None:
    """The workers of a stage live at the same time."""
    for kind in ("CPU", "GPU", "memory"):
        asked, has = _total(roles, kind), total.get(kind, 0.0)
        if asked > has:
            parts = ", ".join(f"{name} {r.workers} x {reserved(r).get(kind, 0.0):g}" for name, r in roles.items())
            raise ConfigError(
                f"stage {stage} asks for {asked:g} {kind} ({parts}), but the cluster has {has:g} in all; "
                "ask for fewer workers or add nodes"
            )

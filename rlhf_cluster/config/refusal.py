"""How a configuration is refused."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot run; its message is the one sentence that the user reads."""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)

"""Every environment variable the package reads: name, allowed values, default, meaning."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A variable with a fixed set of values."""

    name: str
    allowed: tuple[str, ...]
    default: str
    meaning: str

    def read(self) -> str:
        """The value, or the default where unset or empty. Raises ValueError naming the variable."""
        value = os.environ.get(self.name) or self.default
        if value not in self.allowed:
            raise ValueError(f"{self.name} is {value!r}; allowed are {', '.join(self.allowed)}")
        return value


def check() -> None:
    """Raise ValueError, naming the variable, where one has a value that it cannot have: adapters
    ask at start, and not when a variable is first needed."""
    for variable in VARIABLES:
        variable.read()


MODEL = Choice(
    "DSV4_MODEL",
    ("auto", "plugin", "native"),
    "auto",
    "Whose network serves the model. auto: the plugin's where the engine's own cannot run, the "
    "engine's where its kernels are made for the chip.",
)
KERNELS = Choice(
    "DSV4_KERNELS",
    ("auto", "triton", "torch", "reference"),
    "auto",
    "What computes the network's own operations. auto: Triton's kernels on GPUs, torch elsewhere; "
    "reference: their definitions, far slower, to compare with.",
)
EFFORT = Choice(
    "DSV4_DEFAULT_EFFORT",
    ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"),
    "high",
    "The reasoning effort of requests that name none. The authors' API takes high: on April "
    "checkpoints that adds no text, on 0731 the absolute-maximum text; low gives 0731 prompts "
    "without one.",
)
CHAT = Choice(
    "DSV4_CHAT",
    ("plugin", "native"),
    "plugin",
    "Whose prompt encoder, tool parser and reasoning parser are used.",
)
VARIABLES = (MODEL, CHAT, KERNELS, EFFORT)

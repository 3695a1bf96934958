"""What is known of SGLang's versions."""

from __future__ import annotations

import sglang

TESTED = ("0.5.23",)


def require_tested_version() -> None:
    """Raise RuntimeError on an SGLang whose interfaces were not checked."""
    if sglang.__version__ not in TESTED:
        raise RuntimeError(
            f"SGLang {sglang.__version__} is installed; dsv4-plugin is made for "
            f"{' and '.join(TESTED)} (DSV4_MODEL=native leaves the model to SGLang)"
        )

"""vLLM 0.33 on a CPU: its Python files over the compiled ones of the CPU build that is installed,
which are an earlier version's. What runs of them here (threads, shared memory, products) is the
same."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from shutil import copytree

from tests.vllm033.get import SITE


def make_site(folder: Path) -> Path:
    """A folder for the front of the path, made of links; its version names a CPU build."""
    site = copytree(SITE, folder / "site", copy_function=os.symlink)
    installed = importlib.util.find_spec("vllm")
    assert installed is not None
    assert installed.origin is not None
    for library in Path(installed.origin).parent.glob("*.so"):
        (site / "vllm" / library.name).symlink_to(library)
    (info,) = site.glob("vllm-*.dist-info")
    metadata = info / "METADATA"
    text = re.sub(r"^(Version: \S+)$", r"\1+cpu", metadata.read_text(), count=1, flags=re.M)
    metadata.unlink()
    metadata.write_text(text)
    return site

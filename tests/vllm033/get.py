"""Fetch vLLM 0.33's Python files for the tests beside this: its wheel without what was compiled.

python -m tests.vllm033.get
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lab.paths import ROOT

PIN = "vllm==0.33.0"
SITE = ROOT / ".cache" / PIN.replace("==", "-")
WHEELS = (
    "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
    "--abi=abi3", "--platform=manylinux_2_28_x86_64",
)  # fmt: skip


def main() -> None:
    if SITE.exists():
        return
    SITE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SITE.parent) as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", *WHEELS]
        subprocess.run([*download, "--dest", folder, PIN], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        site = Path(folder) / "site"
        with zipfile.ZipFile(wheel) as archive:
            python = [name for name in archive.namelist() if not name.endswith((".so", "vllm-rs"))]
            archive.extractall(site, python)
        site.rename(SITE)


if __name__ == "__main__":
    main()

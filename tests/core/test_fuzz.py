"""Damaged checkpoints: each is refused in a sentence, or loads and answers as the undamaged one."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.checkpoint.files import read_headers
from dsv4_plugin.config import FIELDS
from dsv4_plugin.tools import make
from tests.conftest import A_LAYER_OF_EACH, random_ids
from tests.core.damage import KINDS, damaged

FORMATS = ("bf16", "base", "fp8-fp4", "nvfp4")
OTHERS = ("vision", "ct-nvfp4", "ct-w4a16", "gptq")
EACH = 60
"""Damages of each of OTHERS."""
VOCAB = 64
IDS = random_ids(12, seed=1, vocab=VOCAB)
SECONDS, MEMORY = 10, 2 << 30
"""The most that one damage may take; seconds of this process's own, whatever runs beside it."""
LONGEST = 600
"""Characters of a sentence."""


class TooLate(BaseException):
    """Not an Exception, so that nothing takes it for a refusal."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in each format, of several files."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "SHARD_BYTES", 1 << 18)
        for fmt in FORMATS + OTHERS:
            overrides = A_LAYER_OF_EACH | {"vocab_size": VOCAB}
            make.make_checkpoint(root / fmt, "tiny", 1, overrides, tokenizer=False, fmt=fmt)
    return {fmt: root / fmt for fmt in FORMATS + OTHERS}


@pytest.mark.parametrize(
    ("first", "count"), [(0, 200), pytest.param(200, 10_000, marks=pytest.mark.thorough)]
)
def test_damages(whole: dict[str, Path], first: int, count: int) -> None:
    randoms = {seed: Random(seed) for seed in range(first, first + count)}
    drawn = {seed: random.choice(FORMATS) for seed, random in randoms.items()}
    found: Counter[str] = Counter()
    for fmt in FORMATS:
        found += outcomes(whole[fmt], {s: r for s, r in randoms.items() if drawn[s] == fmt})
    assert found["refused"] > count / 2
    assert found["the same"] > 0


@pytest.mark.parametrize("fmt", OTHERS)
def test_damages_of_other_formats(whole: dict[str, Path], fmt: str) -> None:
    found = outcomes(whole[fmt], {seed: Random(seed) for seed in range(EACH)})
    assert found["refused"] > EACH / 2
    assert found["the same"] > 0


def outcomes(whole: Path, randoms: dict[int, Random]) -> Counter[str]:
    """Of one damage per seed."""
    truth, known = answer(whole), set(read_headers(whole)) | set(FIELDS.fields)
    found: Counter[str] = Counter()
    for seed, random in randoms.items():
        with TemporaryDirectory() as name:
            folder = Path(name) / "damaged"
            folder.mkdir()
            for file in whole.iterdir():
                (folder / file.name).symlink_to(file)
            files = {file.name for file in folder.iterdir()}
            what = f"seed {seed}, {whole.name}, {damaged(folder, random)}"
            with limits(what):
                outcome = outcome_of(folder, truth, files | known)
            assert outcome in ("refused", "the same"), f"{what}: {outcome}"
            found[outcome] += 1
    return found


def outcome_of(folder: Path, truth: torch.Tensor, names: set[str]) -> str:
    """'refused', 'the same', or what is wrong."""
    try:
        logits = answer(folder)
    except (ValueError, OSError, NotImplementedError) as error:
        sentence = str(error)
        if not sentence.replace("é", "e").isprintable() or len(sentence) > LONGEST:
            return f"not a sentence: {sentence!r}"
        told = any(name in sentence.replace(str(folder), "") for name in names)
        return "refused" if told else f"names neither file nor field: {sentence}"
    return "the same" if torch.equal(logits, truth) else "other logits"


def answer(folder: Path) -> torch.Tensor:
    return load(folder, "float32").logits(IDS)


@contextmanager
def limits(what: str) -> Iterator[None]:
    """Raise TooLate after SECONDS; assert afterwards that the process never had MEMORY more."""

    def late(*_: object) -> None:
        raise TooLate(f"{what}: still going after {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    held = memory("VmRSS")
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - start < SECONDS, what
    assert memory("VmHWM") - held < MEMORY, what


def memory(name: str) -> int:
    """Bytes, from the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_every_kind_is_drawn(whole: dict[str, Path], tmp_path: Path) -> None:
    kinds = Counter()
    for seed in range(100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        for file in whole["nvfp4"].iterdir():
            (folder / file.name).symlink_to(file)
        kinds[damaged(folder, Random(seed)).partition(":")[0]] += 1
    assert set(kinds) == {kind.__name__ for kind in KINDS}

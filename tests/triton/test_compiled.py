"""docs/gpu.md says what `benchmarks/results/kernels_compiled.csv` has."""

from __future__ import annotations

from benchmarks import compiled


def test_the_document_has_what_was_compiled():
    """For every case, kernels on every chip, and on each the instructions for tensor cores that a
    case with products has anywhere."""
    assert compiled.BEGIN + compiled.documented() + compiled.END in compiled.DOCUMENT.read_text()
    rows = compiled.read()
    assert len({r.commit for r in rows}) == 2
    for case in compiled.CASES:
        now = [compiled.cells(rows, case, chip)[1] for chip in compiled.CHIPS]
        assert len({bool(r.each) for r in now}) == 1

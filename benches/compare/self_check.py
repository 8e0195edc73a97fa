"""Checks of the comparison itself, which need no framework: CI runs them, so that the script does not rot."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import data
from harness import lockstep
from harness.documents import replace_section
from harness.figures import Figure, aligned, markdown

import model as models


def of_functions() -> None:
    """What can be checked without running anything."""
    assert Figure.of([3.0, 1.0, 2.0]) == Figure(2.0, 1.0, 3.0, 3)
    assert Figure.of([1234.4, 1234.6]).text() == "1,234 [1,234-1,235]"
    assert aligned([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
    assert markdown([["a", "b"], ["c", "d"]]).splitlines()[1] == "| --- | ---: |"

    with tempfile.TemporaryDirectory() as directory:
        document = Path(directory) / "document.md"
        document.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
        replace_section(document, "x", "new")
        assert document.read_text() == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb\n"

    # Two rounds a second of 10 samples; the step to the next epoch, which took long, does not count.
    rounds = [(0, 500), (0, 1000), (0, 1500), (1, 9000), (1, 9500), (1, 10000)]
    events = [{"epoch": epoch, "unix_ms": time, "samples": 10} for epoch, time in rounds]
    assert lockstep.steady_samples_per_second(events) == 20.0

    # A run of a fifth of a second has its memory looked at many times, one of an hour five times a second.
    seconds, looks = 0.0, 0
    while seconds < 0.2:
        seconds, looks = seconds + lockstep.memory_interval(seconds), looks + 1
    assert looks > 10 and lockstep.memory_interval(3600.0) == 0.2

    # Keras' padding, by hand.
    assert models.padded(28, 3, 2, "same") == (0, 1) and models.padded(7, 3, 1, "same") == (1, 1)
    assert models.cropped(3, 2, "same") == (0, 1) and models.cropped(3, 2, "valid") == (0, 0)
    with tempfile.TemporaryDirectory() as directory:
        for file in (Path(__file__).parent / "models").glob("*.toml"):
            model = models.read(file)
            shape = model.input
            for layer in model.layers:
                shape = models.output_of(layer, shape)
            assert shape == model.input, f"{file} ends in {shape}"
            samples = data.random_samples(file, Path(directory))
            # NumPy's files are aligned, so that they can be mapped.
            assert samples.read_bytes().index(b"\n") % 64 == 63, samples


def of_comparisons(comparisons: list[dict[str, Any]]) -> None:
    """What a comparison with a stand-in found."""
    assert comparisons
    for comparison in comparisons:
        assert len(comparison["contenders"]) == 2, comparison
        for name, found in comparison["contenders"].items():
            for figure in ("samples_per_second", "fma_gflops_beside", "percent_of_fma_ceiling", "ours_to_this"):
                assert found[figure]["min"] > 0, f"{name}: {figure}"
            assert found["peak_memory_mb"] > 1 and found["seconds_to_first_step"] > 0, f"{name}: {found}"

"""The flame picture: what is kept of stacks, and shares that add up."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.flame import main, read

MAIN = "<module> (train.py:3);main (atp/commands/train.py:10)"
SAMPLES = f"""\
{MAIN};_call_impl (torch/nn/module.py:1);fit_jointly (atp/run/stages.py:5);linear (torch/nn.py:3) 60
{MAIN};quality (atp/run/assessment.py:5);forward (modeling_llama.py:3);silu (x.py:1) 40
"""


def test_frames_are_those_of_the_package_and_the_innermost_of_a_library(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text(SAMPLES, encoding="utf-8")
    whole = read(tmp_path / "samples")
    assert whole.samples == 100
    (main_frame,) = whole.below.values()
    assert {name: frame.samples for name, frame in main_frame.below.items()} == {
        "stages.fit_jointly": 60,
        "assessment.quality": 40,
    }
    assert list(main_frame.below["assessment.quality"].below) == ["silu"]
    main([str(tmp_path / "samples"), "--title", "a < b", "--output", str(tmp_path / "flame.svg")])
    picture = (tmp_path / "flame.svg").read_text(encoding="utf-8")
    assert "stages.fit_jointly 60.0%" in picture and "a &lt; b" in picture and "<script" not in picture


def test_no_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds no samples"):
        main([str(tmp_path / "empty"), "--output", str(tmp_path / "flame.svg")])

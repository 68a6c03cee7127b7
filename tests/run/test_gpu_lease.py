"""Jobs of a sweep side by side: each takes a GPU that no other job holds, and gives it back by ending."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atp.run import sweep

HOLD = """
import sys
from pathlib import Path
from atp.run.sweep import lease_gpu
print(lease_gpu(Path(sys.argv[1]), 2), flush=True)
sys.stdin.read()
"""


def test_jobs_side_by_side_take_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_leases", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "0\n"
        assert sweep.lease_gpu(tmp_path, 2) == 1
        assert sweep.os.environ["CUDA_VISIBLE_DEVICES"] == "7"
        assert sweep.lease_gpu(tmp_path, 2) is None, "a process has one lease"
        other.kill()
    sweep._leases.pop().release()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.lease_gpu(tmp_path, 2) == 0, "a killed job's GPU is free again"
    sweep._leases.pop().release()

"""Do exports load in the oldest and the newest transformers that pyproject.toml admits, with the same logits?

Exports of this environment, one of every kind of class and family, are loaded without atp by other versions of
transformers and run on the same left-padded batch. A version is installed into a folder of its own (through pip, into
`--folder`, which is kept if given) and put before this environment's; `--python` takes interpreters that have one.

    python -m benchmarks.export_versions --transformers 5.15.0 5.23.0
    python -m benchmarks.export_versions --python /path/to/venv/bin/python
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/model"), str(ROOT / "tests/export")]

LOAD = """
import json, sys
sys.modules["atp"] = None
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
root, names = sys.argv[1], json.loads(sys.argv[2])
batch, expected = load_file(root + "/batch.safetensors"), load_file(root + "/logits.safetensors")
real, found = batch["attention_mask"].bool(), {}
for name in names:
    try:
        model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(**batch).logits[real]
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        cached, uncached = (model.generate(**batch, **options, use_cache=flag) for flag in (True, False))
        found[name] = [float((logits - expected[name]).abs().max()), bool(torch.equal(cached, uncached))]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps([transformers.__version__, torch.__version__, found]))
"""


def main() -> int:
    """Prints a table; 1 where a version gives other logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="*", default=[], metavar="VERSION", help="versions to install and try")
    parser.add_argument("--python", nargs="*", default=[], metavar="PATH", help="interpreters that have one")
    parser.add_argument("--folder", type=Path, help="where versions are installed; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        names = write_exports(Path(temporary))
        installed = arguments.folder or Path(temporary) / "versions"
        places = [(sys.executable, install(version, installed / version)) for version in arguments.transformers]
        places += [(path, None) for path in arguments.python]
        results = [load(python, path, Path(temporary), names) for python, path in places or [(sys.executable, None)]]
    print(f"| export | {' | '.join(f'transformers {version}' for version, _, _ in results)} |")
    print("|---" * (len(results) + 1) + "|")
    for name in names:
        print(f"| {name} | {' | '.join(shown(found[name]) for _, _, found in results)} |")
    wrong = [found[name] for _, _, found in results for name in names if isinstance(found[name], str) or found[name][0]]
    return int(bool(wrong))


def shown(result: list | str) -> str:
    """One cell: largest logit difference, and whether generation with a cache equals generation without."""
    if isinstance(result, str):
        return result
    return f"{result[0]:.1e}{'' if result[1] else ', cache differs'}"


def write_exports(folder: Path) -> list[str]:
    """Exports one model of every kind, with the batch and the logits that are expected."""
    from safetensors.torch import save_file
    from test_architecture import left_padded_batch, real_logits
    from test_export import EXPORTS, pruned

    from atp.export.hf.writing import export_hf

    batch = left_padded_batch()
    save_file(batch, folder / "batch.safetensors")
    logits = {}
    for name in EXPORTS:
        model = pruned(name)
        export_hf(model, None, folder / name)
        logits[name] = real_logits(model, batch)
    save_file(logits, folder / "logits.safetensors")
    return list(EXPORTS)


def install(version: str, folder: Path) -> Path:
    """Installs a version of transformers, and those of its dependencies that this environment has at other versions."""
    from packaging.requirements import Requirement

    if not (folder / "transformers").is_dir():
        pip_install(folder, f"transformers=={version}")
        (dist,) = importlib.metadata.distributions(name="transformers", path=[str(folder)])
        for line in dist.requires or []:
            needed = Requirement(line)
            if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
                continue
            if not needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True):
                pip_install(folder, f"{needed.name}{needed.specifier}")
    return folder


def pip_install(folder: Path, requirement: str) -> None:
    """Installs one package into a folder."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--upgrade",
            "--no-deps",
            "--target",
            str(folder),
            requirement,
        ],
        check=True,
    )


def load(python: str, path: Path | None, folder: Path, names: list[str]) -> tuple[str, str, dict]:
    """Versions and results of one environment."""
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path or "")}
    command = [python, "-P", "-W", "ignore", "-c", LOAD, str(folder), json.dumps(names)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{python} {path or ''} failed: {done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())

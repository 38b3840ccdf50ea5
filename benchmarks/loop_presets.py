"""Run both presets of the loop and keep what the READMEs show.

    python benchmarks/loop_presets.py [--presets smollm2 tiny]

Writes ``benchmarks/results/loop_<preset>.json`` (facts, the steps' records, the printed lines) and
the plots of ``docs/images/<preset>_*.png``.  About 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLOTS = ("reward", "discrepancy", "masked_share", "time_per_phase", "tokens_per_step", "retention")


def run_preset(preset: str, folder: Path) -> dict[str, object]:
    """One run as a user starts it; its standard output is not a terminal, so lines are plain."""
    began = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-m", "asystem_bridge", "loop", "--preset", preset, "--output", folder],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "160"},
    )
    report = (folder / "report" / "report.md").read_text()
    facts = [line.strip("| ").split(" | ") for line in report.splitlines()[4:] if " | " in line]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "preset": preset,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "wall_s": round(time.perf_counter() - began, 1),
        "summary": dict(fact for fact in facts if len(fact) == 2),
        "printed": [line for line in finished.stdout.splitlines() if str(folder) not in line],
        "steps": records,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["smollm2", "tiny"])
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for preset in parser.parse_args().presets:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / preset
            result = run_preset(preset, folder)
            for plot in PLOTS:
                shutil.copy(
                    folder / "report" / "plots" / f"{plot}.png", images / f"{preset}_{plot}.png"
                )
        path = ROOT / "benchmarks" / "results" / f"loop_{preset}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{preset}: {result['wall_s']} s, {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""What `trimtab cost` takes: seconds and peak resident memory of every shipped recipe, all variants, without data.

    python benchmarks/cost.py [PATTERN ...] [--seconds 60] [--gigabytes 2] [--json FILE] [--missing]

Each recipe is counted by a process of its own on one thread, started as a person starts it, and killed when it takes
twice the time or the memory. Seconds are the processor's, so that a busy machine changes them little; beside them stand
those of the clock. Nothing is read but what comes with trimtab. The exit status is 1 if a recipe fails, or needs more
than it may.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from trimtab.experiments import recipe

OTHERS = {"own/answer": ["SmolVLM-256M-Instruct", "Qwen3-VL-2B-Instruct"]}
"""Recipes for any folder -> names of the architectures with which they are counted, in place of their own."""


def runs(names: list[str]) -> list[tuple[str, str, list[str]]]:
    """A recipe, what it is counted with in place of its own backbone, and the overrides that say so."""
    return [(n, other, [f"backbone.name={other}"] if other else []) for n in names for other in OTHERS.get(n, [""])]


def watched(command: list[str], seconds: float, size: float, where: Path) -> dict[str, Any]:
    """Seconds and peak resident bytes of a process, which is killed beyond `seconds` or `size`."""
    start, peak, why = time.monotonic(), 0, ""
    before = processor()
    with (where / "out").open("w+") as out, (where / "err").open("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=where, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if busy(process.pid) > seconds or peak > size:
                why = f"killed at {busy(process.pid):.0f} s and {peak / 1e9:.1f} GB"
                process.kill()
            time.sleep(0.05)
        out.seek(0), err.seek(0)
        told = err.read().strip().splitlines()
        found = json.loads(out.read()) if process.returncode == 0 else []
    why = why or ("" if process.returncode == 0 else (told or ["no word"])[-1])
    rows = found if isinstance(found, list) else [found]
    return {"seconds": round(processor() - before, 1), "clock": round(time.monotonic() - start, 1), "peak": peak,
            "failed": why, "variants": len(rows)}  # fmt: skip


def processor() -> float:
    """Seconds of the processor that processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def busy(pid: int) -> float:
    """Seconds of the processor that a process took until now; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """The most bytes that a process had in memory until now; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def noted(file: Path, found: list[dict[str, Any]]) -> None:
    """Write rows into a file, in the place of older rows of the same recipe and backbone; other rows stay."""
    rows = {(r["recipe"], r["backbone"]): r for r in [*(json.loads(file.read_text()) if file.exists() else []), *found]}
    file.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of recipes")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--json", type=Path, help="rows are written into it one by one, others in it stay")
    parser.add_argument("--missing", action="store_true", help="only what the file does not have yet")
    options = parser.parse_args()
    there = json.loads(options.json.read_text()) if options.missing and options.json.exists() else []
    done = {(row["recipe"], row["backbone"]) for row in there if not row["failed"]}
    found, bad = [], 0
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        names = [n for n in recipe.names() if any(fnmatch(n, p) for p in options.patterns)]
        for name, title, more in (run for run in runs(names) if run[:2] not in done):
            command = [sys.executable, "-W", "ignore", "-m", "trimtab", "cost", name, "--json", *more]
            row = watched(command, 2 * options.seconds, 2e9 * options.gigabytes, where)
            good = not row["failed"] and row["seconds"] < options.seconds and row["peak"] < 1e9 * options.gigabytes
            bad += not good
            found.append({"recipe": name, "backbone": title, **row})
            print(f"{name:36} {title:21} {row['variants']:3} variants {row['seconds']:6.1f} s ({row['clock']:.0f}) "
                  f"{row['peak'] / 1e9:5.2f} GB  {'' if good else row['failed'] or 'too much'}",
                  flush=True)  # fmt: skip
            if options.json:
                noted(options.json, found)
    print(
        f"{len(found)} counted, {bad} of them fail, or need {options.seconds:g} s or {options.gigabytes:g} GB or more"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Would a GPU run every transformation of recsys.prep whole? cudf-polars translates each plan, without a GPU; a fallback is an error.

`make gpu-plan` runs it in an environment of its own (constraints-gpu.txt). The log holds units, versions and what could not be translated.
"""
from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import polars as pl  # noqa: E402
from gpu_check import cases, made  # noqa: E402


def fallbacks(frame: pl.LazyFrame) -> list[str]:
    "What the GPU engine cannot do in a plan; nothing for a plan that it runs whole."
    from cudf_polars.dsl.translate import Translator
    translator = Translator(frame._ldf.visit(), pl.GPUEngine(executor="in-memory", raise_on_fail=True))
    translator.translate_ir()
    return [f"{type(e).__name__}: {e}" for e in translator.errors]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_plan.txt", help="the log")
    args = parser.parse_args()
    probe = fallbacks(pl.LazyFrame({"a": [1]}).select(pl.int_range(pl.len()).over("a")))
    if not probe: sys.exit("gpu-plan: a plan that is known to fall back was accepted: this check proves nothing with these versions")
    names = ("polars", "cudf-polars-cu13", "pylibcudf-cu13", "libcudf-cu13")
    lines = ["Plans of recsys.prep as cudf-polars translates them (make gpu-plan). No GPU was needed, and none was used: nothing ran.",
             ", ".join(f"{n} {metadata.version(n)}" for n in names), f"for comparison, int_range().over(): {probe[0]}", ""]
    bad = 0
    for case in cases(*made(2_000)):
        found = fallbacks(case.unit(case.frame().lazy()))
        bad += bool(found)
        lines += [f"{case.name:<44} {'falls back' if found else 'whole plan on the GPU'}", *(f"    {f}" for f in found)]
    lines += ["", f"{bad} units fall back"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__": sys.exit(main())

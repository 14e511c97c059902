"""Whole-trajectory scoring beside its limit: `python benchmarks/bench_engine.py --help`.

The same command as `rsr bench engine`, whose code is `rsr.benchmarks.engine`.
"""

from rsr.benchmarks.engine import engine

if __name__ == "__main__":
    engine()

"""The rank kernel beside what else one would use: `python benchmarks/bench_kernel.py --help`.

The same command as `rsr bench kernel`, whose code is `rsr.benchmarks.kernel`.
"""

from rsr.benchmarks.kernel_command import kernel

if __name__ == "__main__":
    kernel()

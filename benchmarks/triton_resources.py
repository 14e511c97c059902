"""What the compiler makes of the Triton pass, without a GPU.

Compiles every reachable row of the tile table for the heads of real students and writes registers,
spills, shared memory, tensor-core instruction and instructions per logit to a CSV file.
"""

import argparse
import csv
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from rsr.benchmarks.ahead_of_time import SHARED_MEMORY_BYTES, Variant, compile_pass
from rsr.benchmarks.shapes import PRESETS
from rsr.kernels import tuning
from rsr.kernels.logits import LogitTransform

OUTPUT = Path(__file__).parent / "results" / "triton_resources.csv"
SOFT_CAPS = {"gemma-2-2b": 30.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=OUTPUT, help="where to write [%(default)s]")
    output: Path = parser.parse_args().csv
    compile_once = cache(compile_pass)
    rows = []
    for capability in SHARED_MEMORY_BYTES:
        for student, shape in PRESETS.items():
            transform = LogitTransform(soft_cap=SOFT_CAPS.get(student))
            for num_tokens in (1, shape.num_tokens):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    call = tuning.Call(
                        capability,
                        dtype.itemsize,
                        num_tokens,
                        shape.hidden_size,
                        has_soft_cap=transform.soft_cap is not None,
                        can_describe=True,
                    )
                    tiles = tuning.choose_rule(call).tiles
                    # The depth reaches the code only through whether the tiles divide it.
                    assert shape.hidden_size % tiles.depth == 0
                    variant = Variant(dtype, tiles.depth, transform)
                    rows.append(
                        {
                            "capability": capability,
                            "student": student,
                            "num_tokens": num_tokens,
                            "hidden_size": shape.hidden_size,
                            "vocab_size": shape.vocab_size,
                            "dtype": str(dtype).removeprefix("torch."),
                            **asdict(tiles),
                            **asdict(compile_once(capability, tiles, variant)),
                        }
                    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

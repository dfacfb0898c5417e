"""What benchmarks/gpu.py measures on a GPU runs here in tiny shapes; `--dry-run` runs all of it."""

import pytest

from benchmarks import gpu

# Of each group so many programs; steps and decoding take longest to compile, and are of one kind.
MOST = {"ceilings": 9, "attention": 9, "attention checks": 9, "products": 99, "decoding": 1, "1b": 1, "8b lora": 1}


@pytest.mark.slow
def test_the_programs_run_in_tiny_shapes():
    rows = [row for group, most in MOST.items() for row in gpu.measure(group, tiny=True, most=most)]
    assert [row for row in rows if "failed" in row] == []
    ran = [row["name"] for row in rows if "ms" in row]
    assert len(ran) == 25 and {"product 8192, bf16", "nf4, 8 rows", "1B, cuDNN", "8B LoRA"} <= {*ran}
    assert all("on NVIDIA GPUs" in row["skipped"] for row in rows if "skipped" in row)
    assert all(row["predicted"] for row in rows if "ms" in row)
    lines = list(gpu.table(rows))
    assert len(lines) == len(rows)  # a head; what the first row says of versions is no line
    exact = next(row for row in rows if row["name"] == "attention XLA's: error")
    assert exact["repeats"] and 1e-4 < exact["of the largest number"]["out"] < 0.02

"""Answers the lines of a JSONL file on the GPUs of a Ray cluster: one shard of `python -m infer batch` to a GPU.

    pip install "ray[data]"
    python examples/batch_ray.py --shards 16 MODEL IN.jsonl OUT_FOLDER --max-new-tokens 256

Not run here: Ray is none of our dependencies, and this follows its documentation. All paths must lie on a disk that
every node sees, and Puna must be installed on each. Run it again after a failure: each shard goes on where it stood,
and a shard that is done is left alone. `cat OUT_FOLDER/*.answers.jsonl` puts the answers into one file.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, required=True, help="as many as GPUs, or a few times as many")
    parser.add_argument("model")
    parser.add_argument("lines", type=Path)
    parser.add_argument("folder", type=Path)
    given, options = parser.parse_known_args()
    given.folder.mkdir(parents=True, exist_ok=True)

    def answer(row: dict[str, Any]) -> dict[str, Any]:
        """Runs one shard on the GPU that Ray shows this task."""
        out = given.folder.resolve() / f"{row['id']:05d}.answers.jsonl"
        if not out.exists():
            shard = f"{row['id']}/{given.shards}"
            command = [sys.executable, "-m", "infer", "batch", given.model, str(given.lines.resolve()), str(out)]
            subprocess.run([*command, "--shard", shard, *options], check=True)
        return {"shard": row["id"], "answers": str(out)}

    shards = ray.data.range(given.shards, override_num_blocks=given.shards)
    done = shards.map(answer, num_gpus=1).take_all()
    print(f"{len(done)} shards are in {given.folder}")


if __name__ == "__main__":
    main()

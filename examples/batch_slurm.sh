#!/bin/bash
# Answers the lines of a JSONL file as a job array: each task has one GPU and every N-th line.
#
#   sbatch --array=0-15 examples/batch_slurm.sh MODEL IN.jsonl OUT_FOLDER --max-new-tokens 256
#   cat OUT_FOLDER/*.answers.jsonl > OUT.jsonl
#
# A task that is preempted or killed is put back into the queue, and goes on where it stood. To try again what failed,
# submit the same line: tasks that are done end at once. All tasks must be submitted with the same --array.
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: sbatch --array=0-N $0 MODEL IN.jsonl OUT_FOLDER [options of python -m infer batch]" >&2
    exit 2
fi
model=$1 lines=$2 folder=$3
shift 3
mkdir -p "$folder"
out=$folder/$(printf %05d "$SLURM_ARRAY_TASK_ID").answers.jsonl
shard=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT
if [ ! -e "$out" ]; then
    python -m infer batch "$model" "$lines" "$out" --shard "$shard" "$@"
fi

#!/bin/bash
# Vicuna 7B on a Slurm cluster, one process for each GPU, put back into the queue after a preemption.
#   sbatch --nodes=2 configs/recipes/vicuna/cluster/slurm.sh CONVERSATIONS.json OUTPUT_DIR [section.key=value ...]
# OUTPUT_DIR lies on a disk that all nodes share. Before its time is over Slurm sends SIGTERM; the run saves and ends with
# code 85, and this script asks Slurm to start it again.
#SBATCH --job-name=puna-vicuna-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch --nodes=N $0 CONVERSATIONS.json OUTPUT_DIR [section.key=value ...]" >&2
    exit 2
fi
data=$1 output=$2
shift 2
srun --kill-on-bad-exit=1 python -m train run configs/vicuna-7b.toml data.path="$data" run.output_dir="$output" \
    run.save_minutes=15 "$@"
code=$?
if [ $code -eq 85 ] || [ $code -eq 86 ]; then  # stopped with the step saved, or a peer is lost
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

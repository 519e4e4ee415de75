#!/bin/bash
# Training on SLURM: one process a node, every process drives its node's GPUs.
#   sbatch --nodes=4 tools/launch/slurm.sh configs/base.py /shared/runs/mesc
#SBATCH --job-name=mm_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
#SBATCH --signal=TERM@300       # SIGTERM 5 minutes before the time limit: the run saves and exits 75
set -u
config=$1 workdir=$2
# The work folder is on a file system that all nodes share. --resume starts a new run as well.
srun --kill-on-bad-exit=1 \
  .venv/bin/python -m mm_jax train --config="$config" --workdir="$workdir" --resume
status=$?
# 75: stopped by SIGTERM with everything saved; queue the rest.
[ $status -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $status

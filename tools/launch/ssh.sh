#!/bin/bash
# Training over plain ssh: the same command on every host, with explicit process numbers.
#   tools/launch/ssh.sh "host1 host2" /shared/mm_jax configs/base.py /shared/runs/mesc
# Code and work folder are on a file system that all hosts share.
set -eu
hosts=($1) code=$2 config=$3 workdir=$4
pids=()
# When one process fails or this script is stopped, stop the others (SIGTERM: they save first).
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for i in "${!hosts[@]}"; do
  # -tt: a signal here ends the remote command too.
  ssh -tt "${hosts[$i]}" "cd '$code' && exec .venv/bin/python -m mm_jax train \
    --config='$config' --workdir='$workdir' --resume \
    --coordinator='${hosts[0]}:12355' --num_processes=${#hosts[@]} --process_id=$i" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait -n; done

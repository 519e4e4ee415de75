#!/bin/bash
# Training over plain ssh: the same command on every host, with explicit process numbers.
#   tools/launch/ssh.sh "host1 host2" /shared/mm_jax configs/base.py /shared/runs/mesc
# Code and work folder are on a file system that all hosts share. Exits with 75 when it was stopped
# (Ctrl-C, SIGTERM) with everything saved, else with the first status that is not 0.
set -u
hosts=($1) code=$2 config=$3 workdir=$4

# ssh passes no signals on, so the processes are found by their arguments: the last one is theirs.
stop() {
  for i in "${!hosts[@]}"; do
    ssh -n "${hosts[$i]}" "pkill -TERM -f -- '--workdir=$workdir --resume .*--process_id=$i$'"
  done
}
trap stop INT TERM HUP

for i in "${!hosts[@]}"; do
  ssh -n "${hosts[$i]}" "cd '$code' && exec .venv/bin/python -m mm_jax train \
    --config='$config' --workdir='$workdir' --resume \
    --coordinator='${hosts[0]}:12355' --num_processes=${#hosts[@]} --process_id=$i" &
done
status=0 running=${#hosts[@]}
while [ $running -gt 0 ]; do
  wait -n -p ended
  code=$?
  [ -z "${ended:-}" ] && continue  # a signal came, not an end
  running=$((running - 1))
  if [ $code -ne 0 ] && [ $status -eq 0 ]; then
    status=$code
    stop  # one failed: so do the others
  fi
done
exit $status

#!/usr/bin/env bash
# A run on Slurm: Ray on every node of the allocation, the driver on the first. Submit it from the project's folder:
#
#   sbatch examples/slurm.sh experiment=llama3_8b cluster=gpu_2x8 run.dir="$SCRATCH/runs/llama3-8b"
#
# The same command goes on where a run that was stopped or ran out of time has stood.
#SBATCH --job-name=manta
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=88
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=manta-%j.log

set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: sbatch $0 experiment=NAME run.dir=PATH [SETTING=VALUE ...]" >&2
  exit 2
fi

port=6379
python="${PYTHON:-.venv/bin/python}"
ray="$(dirname "$python")/ray"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):$port"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" # the nodes of an exclusive allocation are among themselves
export OMP_NUM_THREADS=1

srun --nodes=1 --ntasks=1 -w "$head" \
  "$ray" start --head --block --port="$port" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" --disable-usage-stats &
sleep 15
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 -w "$node" \
    "$ray" start --block --address="$address" --num-gpus="${SLURM_GPUS_ON_NODE:-8}" &
done
sleep 15

# Slurm sends SIGTERM to this shell 120 seconds before the end; the driver then writes a last checkpoint.
RAY_ADDRESS="$address" "$python" launch.py "$@" resume=auto &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
if [[ $code -gt 128 ]]; then # the trap ended the wait: now for the driver's own end
  code=0
  wait "$driver" || code=$?
fi
exit "$code"

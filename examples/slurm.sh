#!/usr/bin/env bash
# A run on Slurm: Ray on every node of the allocation, the driver on the first. Submit it from the project's folder:
#
#   sbatch examples/slurm.sh experiment=llama3_8b cluster=gpu_2x8 run.dir="$SCRATCH/runs/llama3-8b"
#
# With the environment .venv-gpu, or another whose python PYTHON names: docs/cluster.md says how to make it, and how many
# nodes (--nodes) an experiment wants.
# The same command goes on where a run that was stopped or ran out of time has stood.
#SBATCH --job-name=manta
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=manta-%j.log

set -euo pipefail

if [[ $# -eq 0 ]]; then
  echo "usage: sbatch $0 experiment=NAME run.dir=PATH [SETTING=VALUE ...]" >&2
  exit 2
fi

port=6379
python="${PYTHON:-.venv-gpu/bin/python}"
ray="$(dirname "$python")/ray"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):$port"
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}" # the nodes of an exclusive allocation are among themselves
export OMP_NUM_THREADS=1
export RAY_process_group_cleanup_enabled=1 # a process that is killed takes vLLM's engine with it
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
has=(--num-gpus="${SLURM_GPUS_ON_NODE:-8}" --num-cpus="$SLURM_CPUS_PER_TASK")

await_nodes() { # return when so many nodes have joined; Manta looks once
  local joined='import ray, sys; ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]))'
  for _ in {1..120}; do
    "$python" -c "$joined" "$address" "$1" && return
    sleep 5
  done
  echo "$0: $1 nodes have not joined $address" >&2
  exit 1
}

srun --nodes=1 --ntasks=1 -w "$head" \
  "$ray" start --head --block --port="$port" "${has[@]}" --disable-usage-stats &
await_nodes 1
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 -w "$node" \
    "$ray" start --block --address="$address" "${has[@]}" &
done
await_nodes "${#nodes[@]}"

# Slurm sends SIGTERM to this shell 600 seconds before the end; the driver then has 580 for its step and a checkpoint.
RAY_ADDRESS="$address" "$python" launch.py cluster.grace_s=580 "$@" resume=auto &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
if [[ $code -gt 128 ]]; then # the trap ended the wait: now for the driver's own end
  code=0
  wait "$driver" || code=$?
fi
exit "$code"

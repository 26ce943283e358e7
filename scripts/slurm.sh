#!/usr/bin/env bash
# A command of imgshared on one machine or many, a process a GPU, by Slurm and torchrun:
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm.sh train configs/translator.yaml data=cells.zarr --resume
#   sbatch --nodes=1 --gpus-per-node=8 scripts/slurm.sh predict runs/translator slide.ome.tif
#   sbatch --nodes=1 --gpus-per-node=4 scripts/slurm.sh evaluate runs/translator cells.zarr 'labels=[drug]' --refit
# All machines must see the same files. Two minutes before its time is over a training leaves a checkpoint and is queued
# again; `train --resume`, `predict` and `evaluate --refit` go on where they stood.
#SBATCH --job-name=imgshared
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
here="${SLURM_SUBMIT_DIR:-$PWD}"
torchrun="${TORCHRUN:-$here/.venv/bin/torchrun}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
processes="${SLURM_GPUS_ON_NODE:-1}"
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / processes > 0 ? ${SLURM_CPUS_PER_TASK:-8} / processes : 1))

srun "$torchrun" --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29500" -m imgshared.cli "$@" &
job=$!
over=0
trap 'over=1; kill -TERM "$job"' TERM # srun hands it on to every process
wait "$job"
status=$?
if [ "$over" = 1 ]; then
  wait "$job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"

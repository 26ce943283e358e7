#!/usr/bin/env bash
# A command of imgshared on one machine or many, a process a GPU, by Slurm and torchrun:
#   sbatch --nodes=2 --gpus-per-node=4 scripts/slurm.sh train configs/translator.yaml data=cells.zarr --resume
#   sbatch --nodes=1 --gpus-per-node=8 scripts/slurm.sh predict runs/translator slide.ome.tif
#   sbatch --nodes=1 --gpus-per-node=4 scripts/slurm.sh evaluate runs/translator cells.zarr 'labels=[drug]' --refit
# All machines must see the same files. Two minutes before its time is over a training is told to leave a checkpoint, and
# the job is queued again; `train --resume`, `predict` of a slide and `evaluate --refit` go on where they stood.
#SBATCH --job-name=imgshared
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
here="${SLURM_SUBMIT_DIR:-$PWD}"
torchrun="${TORCHRUN:-$here/.venv/bin/torchrun}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
cpus="${SLURM_CPUS_PER_TASK:-8}"
processes="${SLURM_GPUS_ON_NODE:-1}"
export OMP_NUM_THREADS=$((cpus / processes > 0 ? cpus / processes : 1))

srun --cpus-per-task="$cpus" "$torchrun" --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 20000))" \
  --shutdown-timeout=100 -m imgshared.cli "$@" &
job=$!
over=0
# scancel, since srun would kill its processes at once where it were sent the signal itself
trap 'over=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
wait "$job"
status=$?
if [ "$over" = 1 ]; then
  wait "$job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$status"

#!/bin/bash
# A training on several machines that outlives its time limit: sbatch examples/slurm.sh --config configs/resnet_imagenet.yaml
#SBATCH --job-name=nslightning
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@180
# Three minutes before the end SLURM sends SIGUSR1: each process ends its step, together they write a checkpoint, and the
# job asks to be queued again. Started again, this script finds the run that it began and goes on, with the same bits.
set -euo pipefail
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:?SLURM runs this script: sbatch examples/slurm.sh --config FILE}" # srun does not take it over from sbatch
srun --kill-on-bad-exit=1 nslightning fit "$@" \
  --trainer.num_nodes="$SLURM_JOB_NUM_NODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" --trainer.strategy=ddp

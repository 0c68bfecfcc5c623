#!/bin/bash
# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
#
# K students as a Slurm job array, a task for each; the arguments are those of train_msd.py:
#
#     sbatch --array=0-3 training_scripts/slurm_array.sh --num_students 4 <other arguments>
#
# Five minutes before the time limit the trainer is told to stop. It writes a checkpoint, ends with status 130, and the
# task is queued again. Tasks of nodes that fail are queued again by Slurm.
#SBATCH --job-name=msd
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -u
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# srun does not take over the task's CPUs by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

srun python training_scripts/train_msd.py "$@" \
  --student_index "$SLURM_ARRAY_TASK_ID" --resume_from_checkpoint latest
status=$?
if [ "$status" -eq 130 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

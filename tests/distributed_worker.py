# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains the DM and the ADM stage on tiny nets: `python distributed_worker.py OUTPUT_DIR PAIRS_DIR BATCH_SIZE`.

Started by itself it is one process, by `torch.distributed.run` one of several.
"""

import sys
from pathlib import Path

from test_training import Images, make_trainer

from diffusers_msd.pairs import PairDataset


def train(output_dir: Path, pairs_dir: Path, batch_size: int):
    for case in ("dm", "adm"):
        datasets = {"images": Images(), "pairs": PairDataset(pairs_dir)}
        trainer = make_trainer(
            case,
            output_dir / case,
            datasets,
            interval=2,
            train_batch_size=batch_size,
            # Two accumulation steps, so that gradients are synchronised once per update.
            gradient_accumulation_steps=2,
            max_train_steps=[4],
            checkpointing_steps=1,
            # Adam would blow rounding errors of vanishing gradients up to the size of the learning rate.
            adam_epsilon=1e-2,
        )
        trainer.fit()
        print(f"{trainer.accelerator.num_processes} processes trained {case}")


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

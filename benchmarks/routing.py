# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""What it takes to fit an `EmbeddingRouter` to many prompts, and to route one.

    OMP_NUM_THREADS=2 python benchmarks/routing.py --num_prompts 1000000 --output runs/routing.json

The embeddings are random clusters in float16, in mapped files, as a cache of prompt embeddings would be. Every fit runs
in a process of its own. Two peaks are measured: memory of the process itself, and what is resident with the pages of
the mapped files, which the system takes back when it needs them.
"""

import multiprocessing
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import torch
from pipeline import table
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tqdm.auto import tqdm

from diffusers_msd import EmbeddingRouter
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import check_writable, write_json


FITS = {
    "kmeans": EmbeddingRouter.fit_kmeans,
    "quadrants": EmbeddingRouter.fit_quadrants,
    "random": EmbeddingRouter.fit_random,
}
SHARD = 100_000
CLUSTERS = 50


@dataclass
class BenchmarkConfig:
    """What is fitted."""

    num_prompts: int = field(default=1_000_000, metadata={"help": "Embeddings in all."})
    width: int = field(default=768, metadata={"help": "Their width D."})
    num_students: list[int] = field(default_factory=lambda: [4, 8], metadata={"help": "Parts K; powers of two."})
    file_format: str = field(
        default="safetensors", metadata={"help": "Of the shards.", "choices": ["safetensors", "npy"]}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder for the shards; default: a temporary one."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self):
        if min(self.num_prompts, self.width, *self.num_students) < 1:
            raise ValueError(
                f"num_prompts, width, num_students: numbers >= 1 expected, got {self.num_prompts}, {self.width} and "
                f"{self.num_students}"
            )


def write_shards(config: BenchmarkConfig, folder: Path) -> list[Path]:
    """Random clusters of unit spread around centres of unit spread, float16, a shard at a time."""
    random = np.random.default_rng(0)
    centers = random.standard_normal((CLUSTERS, config.width), dtype=np.float32)
    paths = []
    for start in tqdm(range(0, config.num_prompts, SHARD), desc="shards"):
        n = min(SHARD, config.num_prompts - start)
        points = random.standard_normal((n, config.width), dtype=np.float32)
        points = (points + centers[random.integers(0, CLUSTERS, n)]).astype(np.float16)
        paths.append(folder / f"embeddings-{start // SHARD:05d}.{config.file_format}")
        if config.file_format == "npy":
            np.save(paths[-1], points)
        else:
            save_file({"embeddings": points}, paths[-1])
    return paths


def map_shards(paths: list[Path]) -> list:
    """The shards, mapped: nothing is read yet."""
    if paths[0].suffix == ".npy":
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
    return [load_file(path)["embeddings"] for path in paths]


class AnonymousMemory:
    """The most memory that the process had for itself, looked at a hundred times a second (Linux)."""

    def __enter__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        finished = False
        while not finished:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.peak = max(self.peak, int(fields["RssAnon"].split()[0]) * 1024)
            finished = self.done.wait(0.01)

    def __exit__(self, *exception):
        self.done.set()
        self.thread.join()


def fit(kind: str, k: int, paths: list[Path]) -> dict:
    """Fits one router in this process and routes with it."""
    shards = map_shards(paths)
    # Imports of scikit-learn and the start of its threads are not counted.
    FITS[kind](torch.randn(1000, shards[0].shape[1], generator=torch.Generator().manual_seed(0)), k)
    with AnonymousMemory() as before:
        time.sleep(0.1)
    with AnonymousMemory() as during:
        began = time.perf_counter()
        router = FITS[kind](shards, k)
        seconds = time.perf_counter() - began
    result = {
        "kind": kind,
        "num_students": k,
        "seconds": seconds,
        "imbalance": router.imbalance,
        "before_bytes": before.peak,
        "peak_bytes": during.peak,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    points = torch.as_tensor(np.array(shards[0][:4096], dtype=np.float32))
    for size in (1, 64, 4096):
        times = []
        for _ in range(30):
            began = time.perf_counter()
            router(embeddings=points[:size])
            times.append(time.perf_counter() - began)
        result[f"microseconds_{size}"] = 1e6 * median(times) / size
    sizes = np.sum([np.bincount(router(embeddings=shard), minlength=k) for shard in shards], axis=0)
    if sizes.tolist() != router.part_sizes:
        raise RuntimeError(f"{kind}: recorded part sizes {router.part_sizes}, but calls give {sizes.tolist()}")
    return result


def report(results: list[dict]) -> str:
    """The figures as Markdown."""
    rows = [
        [
            r["kind"],
            str(r["num_students"]),
            f"**{r['seconds']:.1f}**",
            f"{r['imbalance']:.4f}",
            f"{(r['peak_bytes'] - r['before_bytes']) / 2**20:.0f}",
            f"{r['resident_bytes'] / 2**20:.0f}",
            *(f"{r[f'microseconds_{size}']:.1f}" for size in (1, 64, 4096)),
        ]
        for r in results
    ]
    columns = ["kind", "K", "fit, s", "imbalance", "its memory, MiB", "resident with mapped files, MiB"]
    return table(columns + [f"µs per prompt, batch {size}" for size in (1, 64, 4096)], rows)


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    if config.data_dir is not None:
        check_writable(config.data_dir, "data_dir")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=config.data_dir) as folder:
        paths = write_shards(config, Path(folder))
        jobs = [(kind, k, paths) for kind in FITS for k in config.num_students]
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            results = list(pool.map(fit, *zip(*jobs)))
    print(f"\n{config.num_prompts} x {config.width} float16 in {len(paths)} {config.file_format} files, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    print(report(results))
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "results": results})


if __name__ == "__main__":
    run_script(main)

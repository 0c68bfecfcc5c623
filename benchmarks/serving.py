# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A load test of serving on this machine: Ray Serve against a plain FastAPI wrapper of the same pipeline.

    OMP_NUM_THREADS=1 python benchmarks/serving.py --path runs/quickstart/K2 --output runs/bench/serving.json

Each case offers requests at a fixed rate, whether the answers come or not, over loopback, from this process:

* at 1 and 10 times what the plain wrapper answers when 16 requests are always under way, to both servers;
* with 80 % of the requests on one part, with one and with two replicas of its student;
* with a replica of that student killed in the middle.

Every image is compared with that of the pipeline in this process. `--smoke` shows in a minute or two that all of it runs.
"""

import asyncio
import base64
import io
import json
import multiprocessing
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import aiohttp
import numpy as np
import PIL.Image
import ray
import torch
import uvicorn
from pipeline import table
from ray import serve
from ray.util import list_named_actors

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.config import parse_config, run_script
from diffusers_msd.files import atomic_write, check_writable, write_json
from diffusers_msd.image_requests import Accepted, ImageRequest, condition_arguments, make_images
from diffusers_msd.serve import build_app
from diffusers_msd.serve_config import ServeConfig
from diffusers_msd.serve_http import Made, Timings, http_app, png


UNDER_WAY = 16
PATIENCE = 60


@dataclass
class BenchmarkConfig:
    """What is measured."""

    path: str = field(metadata={"help": "Folder of a pipeline with at least two students."})
    prompts: list[str] | None = field(
        default=None, metadata={"help": "What is asked of a pipeline of prompts; others are asked for all classes."}
    )
    seconds: float = field(default=20.0, metadata={"help": "How long each case offers requests."})
    max_requests: int = field(default=4000, metadata={"help": "Of one case; it ends earlier then."})
    num_images: int = field(default=1, metadata={"help": "Of each request."})
    num_seeds: int = field(default=20, metadata={"help": "Different seeds that are asked for."})
    port: int = field(default=8123, metadata={"help": "Of Ray Serve; the plain wrapper takes the next one."})
    smoke: bool = field(default=False, metadata={"help": "Two seconds a case: does it run at all?"})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures; the tables lie beside it."})

    def __post_init__(self):
        if self.smoke:
            self.seconds, self.max_requests, self.num_seeds = 2.0, 60, 2
        if not min(self.seconds, self.max_requests, self.num_images, self.num_seeds) > 0:
            raise ValueError("seconds, max_requests, num_images, num_seeds: above 0 expected")


class LocalService:
    """A pipeline in this process, as one would put it behind FastAPI without Ray: a thread for each request."""

    def __init__(self, pipe: MultiStudentPipeline):
        self.pipe, self.accepted = pipe, Accepted.by(pipe)
        self.replicas = dict.fromkeys(pipe.students, 1)

    async def make(self, request: ImageRequest) -> Made:
        start = time.perf_counter()
        made = await asyncio.to_thread(make_images, self.pipe, request)
        seconds = time.perf_counter() - start
        timings = Timings(routing=0.0, network=seconds, total=seconds)
        return Made([png(image) for image in made.images], made.student_indices[0], request.num_images, timings)

    async def ready(self) -> dict[int, int]:
        return self.replicas


def load(path: str) -> MultiStudentPipeline:
    pipe = MultiStudentPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_plain(path: str, port: int) -> None:
    uvicorn.run(http_app(LocalService(load(path))), port=port, log_level="error")


@contextmanager
def plain(path: str, port: int) -> Iterator[str]:
    """The URL of the plain wrapper, in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=run_plain, args=(path, port))
    process.start()
    try:
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


@contextmanager
def served(path: str, port: int, **settings) -> Iterator[str]:
    """The URL of Ray Serve, as it is set by default, and with `settings`."""
    serve.run(build_app(path, ServeConfig(**settings)), name="benchmark")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.delete("benchmark")


def wait_for_port(port: int, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        if time.monotonic() > end:
            raise OSError(f"port: nothing listens at {port} after {seconds:.0f} s")
        time.sleep(0.2)


@dataclass
class Answer:
    """What became of a request: its status (0 if there was none within `PATIENCE` seconds), seconds, and the images."""

    body: dict
    status: int
    seconds: float
    images: list[str]


async def post(session: aiohttp.ClientSession, url: str, body: dict) -> Answer:
    start = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/images", json=body) as response:
            content, status = await response.read(), response.status
    except (aiohttp.ClientError, TimeoutError):
        content, status = b"", 0
    seconds = time.perf_counter() - start
    return Answer(body, status, seconds, json.loads(content)["images"] if status == 200 else [])


async def at_rate(url: str, bodies: list[dict], rate: float) -> tuple[list[Answer], float, float]:
    """Answers to requests that are sent `rate` a second; the seconds of the sending, and until the last answer."""
    timeout, connector = aiohttp.ClientTimeout(PATIENCE), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        start, tasks = time.perf_counter(), []
        for i, body in enumerate(bodies):
            # What is late is sent at once, so that a slow moment does not lower the rate.
            await asyncio.sleep(max(0.0, start + i / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(post(session, url, body)))
        sent = time.perf_counter() - start
        answers = await asyncio.gather(*tasks)
        return list(answers), sent, time.perf_counter() - start


async def capacity(url: str, bodies: list[dict], seconds: float) -> float:
    """Answers per second when `UNDER_WAY` requests always wait for one."""
    ahead, end = iter(bodies), time.perf_counter() + seconds

    async def one_after_another(session: aiohttp.ClientSession) -> int:
        answered = 0
        while time.perf_counter() < end and (body := next(ahead, None)) is not None:
            answered += (await post(session, url, body)).status == 200
        return answered

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as session:
        start = time.perf_counter()
        answered = await asyncio.gather(*(one_after_another(session) for _ in range(UNDER_WAY)))
        return sum(answered) / (time.perf_counter() - start)


class Load:
    """Requests of a pipeline, and what the pipeline itself answers to them."""

    def __init__(self, config: BenchmarkConfig):
        self.config, self.pipe = config, load(config.path)
        name = "prompt" if self.pipe.takes_prompts else "class_label"
        conditions = config.prompts if self.pipe.takes_prompts else list(range(Accepted.by(self.pipe).num_classes))
        if not conditions:
            raise ValueError("prompts: a pipeline of prompts is asked for some")
        self.images = {}
        parts = self.pipe.route(**condition_arguments(self.pipe, conditions))
        self.bodies: dict[int, list[dict]] = {k: [] for k in parts}
        for condition, k in zip(conditions, parts):
            for seed in range(config.num_seeds):
                request = ImageRequest(condition, seed * config.num_images, config.num_images)
                body = {name: condition, "seed": request.seed, "num_images": request.num_images}
                self.bodies[k].append(body)
                self.images[json.dumps(body)] = [pixels(png(i)) for i in make_images(self.pipe, request).images]

    def draw(self, count: int, hot: int | None = None) -> list[dict]:
        """Random requests, every part alike, or 80 % on the part `hot`."""
        draw, parts = random.Random(0), list(self.bodies)
        others = [k for k in parts if k != hot]
        drawn = (hot if hot is not None and draw.random() < 0.8 else draw.choice(others) for _ in range(count))
        return [draw.choice(self.bodies[k]) for k in drawn]

    def is_wrong(self, answer: Answer) -> bool:
        """Whether an image is another than the pipeline's: in a batch, a pixel may be rounded to the next level."""
        made = [pixels(base64.b64decode(image)) for image in answer.images]
        return any(np.abs(a - b).max() > 1 for a, b in zip(made, self.images[json.dumps(answer.body)], strict=True))

    def measure(self, url: str, rate: float, hot: int | None = None) -> dict:
        """Offers requests to a server and says what became of them."""
        count = min(self.config.max_requests, max(1, round(rate * self.config.seconds)))
        answers, sent, whole = asyncio.run(at_rate(url, self.draw(count, hot), rate))
        answered = [answer for answer in answers if answer.status == 200]
        quantiles = np.quantile([a.seconds for a in answered], [0.5, 0.95, 0.99]) if answered else [float("nan")] * 3
        statuses = Counter(answer.status for answer in answers)
        return {
            "offered_per_s": count / sent,
            "answered_per_s": len(answered) / whole,
            **dict(zip(("p50_s", "p95_s", "p99_s"), map(float, quantiles))),
            "requests": count,
            "statuses": {str(status): number for status, number in sorted(statuses.items())},
            "wrong": sum(map(self.is_wrong, answered)),
        }


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(file))).astype(int)


def warm(url: str, bodies: list[dict]) -> None:
    asyncio.run(capacity(url, bodies[: 4 * UNDER_WAY], 10.0))


def against_plain(requests: Load, config: BenchmarkConfig) -> tuple[float, dict[str, dict]]:
    """What the plain wrapper can do, and both servers at 1 and 10 times of that."""
    some, cases = requests.draw(config.max_requests), {}
    with plain(config.path, config.port + 1) as url:
        warm(url, some)
        most = asyncio.run(capacity(url, some, config.seconds))
        for factor in (1, 10):
            cases[f"plain, {factor}x"] = requests.measure(url, factor * most)
    with served(config.path, config.port) as url:
        warm(url, some)
        for factor in (1, 10):
            cases[f"Ray Serve, {factor}x"] = requests.measure(url, factor * most)
    return most, cases


def skewed(requests: Load, config: BenchmarkConfig, rate: float) -> dict[str, dict]:
    """80 % on one part, with and without a second replica of its student, and with one of the two killed."""
    hot, cases = min(requests.bodies), {}
    for replicas in (1, 2):
        each = [replicas if k == hot else 1 for k in sorted(requests.pipe.students)]
        with served(config.path, config.port, replicas=each) as url:
            warm(url, requests.draw(config.max_requests, hot))
            cases[f"80 % on one part, replicas of it: {replicas}"] = requests.measure(url, rate, hot)
            if replicas == 2:
                half = min(config.seconds, config.max_requests / rate) / 2
                killer = ThreadPool(1).apply_async(kill_later, (hot, half))
                cases["the same, one of the 2 killed"] = requests.measure(url, rate, hot)
                killer.get()
    return cases


def kill_later(k: int, seconds: float) -> None:
    time.sleep(seconds)
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    ray.kill(ray.get_actor(next(name for name in names if f"benchmark#student_{k}#" in name), namespace="serve"))


def report(cases: dict[str, dict], most: float) -> str:
    """The cases as Markdown."""
    header = ["case", "offered /s", "answered /s", "p50 ms", "p95 ms", "p99 ms", "answers by status", "wrong images"]
    rows = [
        [name, f"{case['offered_per_s']:.1f}", f"**{case['answered_per_s']:.1f}**"]
        + [f"{1000 * case[p]:.0f}" for p in ("p50_s", "p95_s", "p99_s")]
        + [", ".join(f"{status}: {n}" for status, n in case["statuses"].items()), str(case["wrong"])]
        for name, case in cases.items()
    ]
    ratios = [
        f"{factor}x: answered {ours['answered_per_s'] / theirs['answered_per_s']:.2f}, "
        f"p95 {ours['p95_s'] / theirs['p95_s']:.2f}"
        for factor in (1, 10)
        for ours, theirs in [(cases[f"Ray Serve, {factor}x"], cases[f"plain, {factor}x"])]
    ]
    return (
        f"1x is {most:.1f} requests per second, what the plain wrapper answers.\n\n{table(header, rows)}\n\n"
        f"Ray Serve / plain: {'; '.join(ratios)}.\n"
    )


def main():
    (config,) = parse_config([BenchmarkConfig], __doc__, None)
    if config.output is not None:
        check_writable(Path(config.output).parent, "output")
    requests = Load(config)
    # More than there are: processes share the cores, as the plain wrapper's threads do.
    ray.init("local", num_cpus=64, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": config.port})
        most, cases = against_plain(requests, config)
        # Twice what the plain wrapper can do: the hot part has more than it can answer.
        cases.update(skewed(requests, config, 2 * most))
    finally:
        serve.shutdown()
        ray.shutdown()
    text = report(cases, most)
    print(f"\ntorch {torch.__version__}, Ray {ray.__version__}, {sys.version.split()[0]}\n\n{text}")
    if config.output is not None:
        write_json(config.output, {"config": asdict(config), "capacity_per_s": most, "cases": cases})
        atomic_write(Path(config.output).with_suffix(".md"), text)


if __name__ == "__main__":
    run_script(main)

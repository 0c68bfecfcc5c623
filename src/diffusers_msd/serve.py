# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A pipeline behind HTTP on Ray Serve: one deployment per student, and an ingress that reads, embeds and routes.

    pip install 'diffusers_msd[serve]'
    diffusers-msd serve PATH

Load on one part of the conditions is load on one deployment, which has replicas, a queue and batches of its own.
"""

import asyncio
import os
import signal
import socket
import threading
import time
from pathlib import Path

import ray
import torch
from diffusers import UNet2DModel
from fastapi import FastAPI, HTTPException
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from .denoiser import num_classes
from .image_requests import Accepted, ImageRequest
from .pipeline_inputs import SLOTS
from .pipeline_msd import MultiStudentPipeline
from .serve_config import DTYPES, ServeConfig
from .serve_http import Made, Timings, http_app
from .serve_student import Job, StudentReplica


APPLICATION = "diffusers-msd"
# A replica, or the node it was on, is gone; the request may be made again, since the same seed gives the same image.
LOST = (RayActorError, ObjectLostError)
# How long a request that waits for a student looks away while all replicas are full. Ray's own half a second leaves
# replicas of small networks without work most of the time.
ROUTING = RequestRouterConfig(initial_backoff_s=0.005, max_backoff_s=0.02)


@serve.ingress()
class Ingress:
    """Checks a request, embeds the prompt, routes it and asks the student.

    Args:
        path: the saved pipeline.
        config: how it is served.
        students: the deployments.
    """

    def __init__(self, path: str, config: ServeConfig, students: dict[int, DeploymentHandle]):
        self.config, self.students = config, students
        self.api_key = read_api_key(config.api_key_variable)
        self.pipe, self.accepted = load_front(path, config, tuple(students))
        self.ongoing, self.closed = 0, False
        self.lost = Counter(
            "diffusers_msd_lost_calls", "Calls of a student whose replica was lost, made again.", ("student",)
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        # Ray Serve asks for the application once the replica is there.
        return http_app(self, self.config.max_body_size, self.api_key)

    async def make(self, request: ImageRequest) -> Made:
        """The images of a request, before the deadline; HTTPException 422, 429, 503 or 504 if there are none."""
        retry = {"Retry-After": str(self.config.retry_after)}
        if self.closed:
            raise HTTPException(503, "the server is shutting down", retry)
        self.ongoing += 1
        try:
            async with asyncio.timeout(self.config.deadline):
                return await self._make(request)
        except TimeoutError as error:
            raise HTTPException(504, f"no image within {self.config.deadline} s") from error
        except BackPressureError as error:
            raise HTTPException(429, "the queue of this student is full", retry) from error
        finally:
            self.ongoing -= 1

    async def _make(self, request: ImageRequest) -> Made:
        start = time.perf_counter()
        condition, k = await asyncio.to_thread(self._route, request)
        if k not in self.students:
            raise HTTPException(422, f"{condition_name(self.pipe)}: its student {k} is not in this pipeline")
        routed = time.perf_counter()
        pngs, seconds, images_in_call = await self._ask(k, Job(condition, list(request.seeds)))
        timings = Timings(routing=routed - start, network=seconds, total=time.perf_counter() - start)
        return Made(pngs, k, images_in_call, timings)

    def _route(self, request: ImageRequest) -> tuple[int | torch.Tensor, int]:
        """What the student takes, a label or an embedding [1, L, D] on the CPU, and which student."""
        condition, mask = request.condition, None
        routed_by = {"class_labels": [condition]}
        if self.pipe.takes_prompts:
            condition, mask = self.pipe.encode_prompt(condition)
            routed_by = {"prompt_embeds": condition, "prompt_mask": mask}
            condition = condition.cpu()
        k = self.pipe.route(**routed_by)[0] if request.student is None else request.student
        return condition, k

    async def _ask(self, k: int, job: Job) -> tuple[list[bytes], float, int]:
        for _ in range(1 + self.config.retries):
            response = self.students[k].answer.remote(job)
            try:
                return await response
            except asyncio.CancelledError:
                # The deadline, or a client that has gone: nobody shall compute for them.
                response.cancel()
                raise
            except LOST:
                self.lost.inc(tags={"student": str(k)})
        raise HTTPException(503, f"student {k} was lost {1 + self.config.retries} times")

    async def ready(self) -> dict[int, int]:
        """Running replicas of each student; none at all once closed."""
        if self.closed:
            return {}
        application = serve.get_replica_context().app_name
        deployments = (await asyncio.to_thread(serve.status)).applications[application].deployments
        return {k: deployments[deployment_name(k)].replica_states.get("RUNNING", 0) for k in self.students}

    async def close(self) -> None:
        """Takes no new requests, and returns when those that were taken are answered."""
        self.closed = True
        while self.ongoing:
            await asyncio.sleep(0.05)


def deployment_name(k: int) -> str:
    """What Ray Serve calls student k."""
    return f"student_{k}"


def condition_name(pipe: MultiStudentPipeline) -> str:
    """The field of a request that the pipeline goes by."""
    return "prompt" if pipe.takes_prompts else "class_label"


def read_api_key(variable: str | None) -> str | None:
    """The key in an environment variable, or None if no variable is named.

    Raises:
        ValueError: there is no such variable, or it is empty: a server that was meant to be closed shall not be open.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ValueError(f"api_key_variable: {variable} is not set in the environment of the ingress")
    return os.environ[variable]


def saved_students(path: str) -> list[int]:
    """The students of a saved pipeline, by its index alone.

    Raises:
        FileNotFoundError: there is no pipeline at `path`.
        ValueError: it has no students, or takes prompts and has nothing to read them with.
    """
    present = MultiStudentPipeline.saved_components(path)
    students = [k for k, slot in enumerate(SLOTS) if slot in present]
    if not students:
        raise ValueError(f"path: the pipeline at {path} has no students")
    if "vae" in present and not {"text_encoder", "tokenizer"} <= present:
        raise ValueError(f"path: the pipeline at {path} has no text_encoder and tokenizer to read prompts with")
    return students


def load_front(path: str, config: ServeConfig, students: tuple[int, ...]) -> tuple[MultiStudentPipeline, Accepted]:
    """The pipeline without its networks, but with text encoder and router, and what may be asked of it."""
    left_out = ["unet", "vae", "safety_checker", "feature_extractor", *(SLOTS[k] for k in students)]
    pipe = MultiStudentPipeline.from_pretrained(path, dtype=DTYPES[config.dtype], **dict.fromkeys(left_out))
    pipe.to("cuda" if config.ingress_num_gpus else "cpu")
    classes = None
    if not pipe.takes_prompts:
        # LoRA students are adapters of the one network in `unet`.
        network = "unet" if "unet" in MultiStudentPipeline.saved_components(path) else SLOTS[students[0]]
        with torch.device("meta"):
            classes = num_classes(UNet2DModel.from_config(UNet2DModel.load_config(path, subfolder=network)))
    return pipe, Accepted(classes, students, config.max_images, config.max_prompt_length)


def build_app(path: str | Path, config: ServeConfig) -> serve.Application:
    """The application, for `serve.run`.

    Args:
        path: a pipeline's folder, which every node must be able to read, or its Hub id.
        config: how it is served.

    Raises:
        FileNotFoundError, ValueError: there is no pipeline at `path`, or the settings do not fit it.
    """
    path = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
    students = saved_students(path)
    replicas = config.replicas_of(students)
    handles = {}
    for k in students:
        others = [j for j in students if j != k]
        options = {**config.student_options(*replicas[k]), "request_router_config": ROUTING}
        deployment = serve.deployment(StudentReplica).options(name=deployment_name(k), **options)
        handles[k] = deployment.bind(path, k, others, config)
    ingress = serve.deployment(Ingress).options(
        name="ingress", request_router_config=ROUTING, **config.ingress_options(students)
    )
    return ingress.bind(path, config, handles)


def app(settings: dict) -> serve.Application:
    """As `build_app`, for `serve run` and its files: the fields of `ServeConfig`, and `path`, by name."""
    settings = dict(settings)
    return build_app(settings.pop("path"), ServeConfig(**settings))


def drain(name: str = APPLICATION) -> None:
    """Takes an application down without losing a request: refuses new ones, waits for the others, then deletes it."""
    serve.get_app_handle(name).broadcast("close").results()
    serve.delete(name)


def check_port(host: str, port: int) -> None:
    """Refuses what cannot be listened at; Ray Serve would start and not be reached."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"host, port: {host}:{port} cannot be listened at: {error}") from error


def run(
    path: str | Path,
    config: ServeConfig,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str = "local",
    metrics_port: int | None = None,
) -> None:
    """Serves a pipeline until it is interrupted (Ctrl-C or SIGTERM), and then answers what it has accepted.

    Args:
        path, config: as for `build_app`.
        host: to listen at; the default is reached from this machine alone.
        port: to listen at.
        address: "local" starts Ray on this machine; "auto", or the address of a cluster, uses that one.
        metrics_port: where a Ray started here exports metrics, in the form of Prometheus; None lets it choose.

    Raises:
        FileNotFoundError, ValueError: as `build_app`; or the port cannot be had, or there is no API key.
    """
    application = build_app(path, config)
    check_port(host, port)
    options = {}
    if address == "local":
        read_api_key(config.api_key_variable)
        # All that is asked for, even if there are fewer cores: replicas then share them, where Ray would wait for ever.
        cpus = config.cpus(saved_students(path))
        options = {"num_cpus": cpus, "include_dashboard": False, "_metrics_export_port": metrics_port}
    ray.init(address, **options)
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application, name=APPLICATION)
        interrupted.wait()
        drain()
    finally:
        serve.shutdown()
        ray.shutdown()

# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""A served pipeline on a Ray of this machine: images, mixed batches, full queues, deadlines, lost replicas, drain."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
import PIL.Image
import pytest
import ray
import yaml
from helpers import free_port, random_prompts, tiny_pipeline, tiny_text_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import serve
from ray.serve.schema import ServeDeploySchema
from ray.util import list_named_actors
from test_adapters import lora_pipeline
from test_serve_http import CONTENT_TYPES, bodies

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.image_requests import Accepted, ImageRequest, make_images
from diffusers_msd.serve import app, build_app, drain, load_front, run, saved_students
from diffusers_msd.serve_config import ServeConfig
from diffusers_msd.serve_http import png
from diffusers_msd.serve_student import Job, arguments, groups, load_student


# The replicas have one thread.
pytestmark = [pytest.mark.services, pytest.mark.usefixtures("one_thread")]

KEY, VARIABLE = "nobody-knows-this", "TEST_SERVING_KEY"
# Many processes on few cores: Ray counts cores, so each asks for a small part of one.
SMALL = {"num_cpus": 0.1, "ingress_num_cpus": 0.1, "deadline": 120.0}


def wait_until(condition, seconds: float = 180):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)
    return value


@pytest.fixture(scope="module")
def cluster():
    """The URL that applications are served at, and the one of the metrics."""
    port, metrics = free_port(), free_port()
    os.environ[VARIABLE] = KEY
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _metrics_export_port=metrics,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics"
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ[VARIABLE]


@pytest.fixture
def started(cluster):
    """Serves a folder under a name; the client of it is returned, and what is left is deleted after the test."""
    names = []

    def start(name: str, folder, **settings) -> httpx.Client:
        names.append(name)
        serve.run(build_app(folder, ServeConfig(**{**SMALL, **settings})), name=name, route_prefix=f"/{name}")
        return httpx.Client(base_url=f"{cluster[0]}/{name}", timeout=180)

    yield start
    for name in set(names) & set(serve.status().applications):
        serve.delete(name)


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A saved pipeline of two students, loaded again, and its folder."""
    folder = tmp_path_factory.mktemp("labels") / "pipeline"
    tiny_pipeline(2).save_pretrained(folder)
    pipe = MultiStudentPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


def ask(client: httpx.Client, **body) -> httpx.Response:
    return client.post("/v1/images", json=body)


def ask_all(client: httpx.Client, bodies: list[dict], threads: int = 16, headers: dict = {}, done: list | None = None):
    """Asks for all at once, as far as there are threads; answers in the order of the bodies, and of their coming."""

    def post(body: dict) -> httpx.Response:
        answer = client.post("/v1/images", json=body, headers=headers)
        if done is not None:
            done.append(answer)
        return answer

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(post, bodies))


def images_of(answer: httpx.Response) -> list[bytes]:
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image) for image in answer.json()["images"]]


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(file))).astype(int)


def expected(pipe, condition, seed: int, num_images: int = 1) -> list[bytes]:
    return [png(image) for image in make_images(pipe, ImageRequest(condition, seed, num_images)).images]


def assert_same_image(file: bytes, of_pipeline: bytes) -> None:
    """What a batch may change: another order of sums rounds one pixel in thousands to the neighbouring level."""
    difference = np.abs(pixels(file) - pixels(of_pipeline))
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.05


def test_a_batch_is_cut_where_it_has_enough_images():
    jobs = [Job(0, list(range(n))) for n in (3, 1, 5, 1, 1, 9)]
    assert [[len(job.seeds) for job in group] for group in groups(jobs, 4)] == [[3, 1], [5], [1, 1], [9]]


def test_lora_students_are_served_apart(tmp_path):
    lora_pipeline(2).save_pretrained(tmp_path / "pipeline")
    path, config = str(tmp_path / "pipeline"), ServeConfig()
    whole = MultiStudentPipeline.from_pretrained(path)
    students = saved_students(path)
    front, accepted = load_front(path, config, tuple(students))
    assert accepted == Accepted.by(whole) and not front.students and front.unet is None
    for label in range(4):
        (k,) = front.route(class_labels=[label])
        student = load_student(path, [j for j in students if j != k], config)
        assert list(student.students) == [k]
        (image,) = student(student=k, **arguments([Job(label, [5])])).images
        assert png(image) == expected(whole, label, 5)[0]


def test_what_is_no_pipeline_is_refused_before_anything_starts(labels, tmp_path):
    with pytest.raises(FileNotFoundError, match="^path: "):
        build_app(tmp_path / "nothing", ServeConfig())
    with pytest.raises(ValueError, match="^replicas: one number, or 2"):
        app({"path": str(labels[0]), "replicas": [1, 2, 3]})
    with pytest.raises(ValueError, match="^api_key_variable: NOT_SET_ANYWHERE is not set"):
        run(labels[0], ServeConfig(api_key_variable="NOT_SET_ANYWHERE"), port=free_port())
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ValueError, match="^host, port: "):
        run(labels[0], ServeConfig(), port=other.getsockname()[1])
    with pytest.raises(ValueError, match="^host, port: "):
        run(labels[0], ServeConfig(), port=70000)


def test_the_file_of_the_recipe_is_one_of_ray_and_builds_an_application(labels):
    file = Path(__file__).parents[1] / "docs" / "recipes" / "serve.yaml"
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text())).applications
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    assert isinstance(app({**application.args, "path": str(labels[0])}), serve.Application)


def test_prompts_one_by_one_give_the_images_of_the_pipeline_to_the_last_bit(started, tmp_path):
    folder = tmp_path / "pipeline"
    tiny_text_pipeline(tmp_path, 2).save_pretrained(folder)
    pipe = MultiStudentPipeline.from_pretrained(folder)
    client = started("prompts", folder, max_batch_size=1, max_queue=1, retry_after=7, api_key_variable=VARIABLE)

    prompts, key = random_prompts(16), {"Authorization": f"Bearer {KEY}"}
    assert ask(client, prompt="cat").status_code == 401
    wanted = {prompt: expected(pipe, prompt, 3, 2) for prompt in prompts}
    bodies = [{"prompt": prompt, "seed": 3, "num_images": 2} for prompt in prompts * 4]
    answers = ask_all(client, bodies, threads=32, headers=key)

    # One runs, one is ahead of it and one waits; of 32 at once others are refused.
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and all(answer.headers["Retry-After"] == "7" for answer in refused)
    for body, answer in zip(bodies, answers):
        if answer.status_code != 429:
            assert images_of(answer) == wanted[body["prompt"]]
            assert answer.json()["images_in_call"] == 2
    served = [client.post("/v1/images", json=body, headers=key) for body in bodies[:16]]
    assert [images_of(answer) for answer in served] == list(wanted.values())
    assert [answer.json()["student_indices"][0] for answer in served] == pipe.route(prompt=prompts)


def test_who_waits_longer_than_the_deadline_is_told_so(started, labels):
    client = started("hurried", labels[0], deadline=0.001)
    answer = ask(client, class_label=1)
    assert answer.status_code == 504 and "0.001 s" in answer.json()["detail"]
    assert client.get("/healthz").status_code == 200


def test_any_request_is_answered_or_refused_in_one_line(started, labels):
    folder, pipe = labels
    client = started("anything", folder)

    @settings(max_examples=200, deadline=None)
    @given(bodies, st.sampled_from(CONTENT_TYPES))
    def ask_anything(body, content_type):
        answer = client.post("/v1/images", content=body, headers={"Content-Type": content_type})
        assert answer.status_code in (200, 400, 415, 422)
        if answer.status_code != 200:
            assert "\n" not in answer.json()["detail"] and len(answer.text) < 500

    ask_anything()
    for path in ("/../../etc/passwd", "/v1/images/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/%00"):
        assert client.get(path).status_code in (404, 405)
    assert images_of(ask(client, class_label=1)) == expected(pipe, 1, 0)


def test_labels_under_load_with_a_replica_lost(started, cluster, labels):
    folder, pipe = labels
    client = started("labels", folder, replicas=[2, 1], max_batch_size=4, batch_wait=0.05)
    readiness = client.get("/readyz")
    assert readiness.status_code == 200 and readiness.json()["students"] == {"0": 2, "1": 1}

    # A request that is alone is the same call as that of the pipeline.
    for label in range(4):
        answer = ask(client, class_label=label, seed=9, num_images=3)
        assert images_of(answer) == expected(pipe, label, 9, 3)
        assert answer.json()["student_indices"] == [label // 2] * 3
    assert ask(client, class_label=0, student=1).json()["student_indices"] == [1]
    assert ask(client, class_label=4).status_code == 422
    assert client.post("/v1/images", content=b" " * 20_000).status_code == 413

    wanted = {(label, seed): expected(pipe, label, seed)[0] for label in range(4) for seed in range(20)}
    different = [pixels(file) for file in wanted.values()]
    assert all(np.abs(a - b).max() > 10 for i, a in enumerate(different) for b in different[:i])
    bodies = [{"class_label": label, "seed": seed} for label, seed in wanted]
    with ThreadPoolExecutor(1) as pool:
        done: list[httpx.Response] = []
        answers = pool.submit(ask_all, client, bodies * 2, done=done)
        wait_until(lambda: len(done) >= 20)
        before = lose_a_replica("labels", "student_0")
        answers = answers.result()
    for (label, seed), answer in zip(list(wanted) * 2, answers):
        assert_same_image(images_of(answer)[0], wanted[label, seed])
        assert answer.json()["student_indices"] == [label // 2]
    # The requests were mixed.
    assert max(answer.json()["images_in_call"] for answer in answers) > 1

    wait_until(lambda: client.get("/readyz").json()["students"] == {"0": 2, "1": 1})
    assert replicas("labels", "student_0") != before
    check_metrics(cluster[1])
    check_drain(client, bodies, wanted)


def test_a_student_that_has_too_much_to_do_gets_another_replica(started, labels):
    client, enough = started("growing", labels[0], max_replicas=[2], max_batch_size=1), threading.Event()

    def keep_asking() -> None:
        while not enough.is_set():
            assert ask(client, class_label=0).status_code == 200

    with ThreadPoolExecutor(8) as pool:
        try:
            asking = [pool.submit(keep_asking) for _ in range(8)]
            # Ray adds one after half a minute of too many requests.
            wait_until(lambda: client.get("/readyz").json()["students"] == {"0": 2, "1": 1})
        finally:
            enough.set()
    for asked in asking:
        asked.result()


def replicas(application: str, deployment: str) -> list[str]:
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return sorted(name for name in names if f"{application}#{deployment}#" in name)


def lose_a_replica(application: str, deployment: str) -> list[str]:
    """Kills a process in the middle of its work; returns the replicas that there were."""
    names = replicas(application, deployment)
    assert len(names) == 2
    ray.kill(ray.get_actor(names[0], namespace="serve"))
    return names


def check_metrics(url: str) -> None:
    """Counted per student: requests, images, batches, waiting; and the refusals of the door."""

    def exported() -> str:
        return httpx.get(url, timeout=30).text

    names = (
        "ray_diffusers_msd_images_total",
        "ray_diffusers_msd_images_per_call_count",
        "ray_serve_deployment_request_counter_total",
        "ray_serve_deployment_processing_latency_ms_count",
        "ray_serve_deployment_queued_queries",
        "ray_serve_actual_batch_size_count",
    )

    def missing() -> list[tuple[str, int]]:
        lines = exported().splitlines()
        found = {(line.split("{")[0], k) for line in lines for k in (0, 1) if f'deployment="student_{k}"' in line}
        return [(name, k) for name in names for k in (0, 1) if (name, k) not in found]

    # Each process sends its own every few seconds.
    wait_until(lambda: not missing())
    lines = exported().splitlines()
    assert any("ray_serve_num_http_error_requests_total{" in line and 'error_code="413"' in line for line in lines)
    assert KEY not in "\n".join(lines)


def check_drain(client: httpx.Client, bodies: list[dict], wanted: dict) -> None:
    """What was accepted is answered; the rest is told to come again, or that nobody is there."""
    with ThreadPoolExecutor(1) as pool:
        done: list[httpx.Response] = []
        answers = pool.submit(ask_all, client, bodies, 32, done=done)
        wait_until(lambda: done)
        drain("labels")
        answers = answers.result()
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 503, 404} and statuses[0] == 200
    for body, answer in zip(bodies, answers):
        if answer.status_code == 200:
            assert_same_image(images_of(answer)[0], wanted[body["class_label"], body["seed"]])
    assert client.get("/readyz").status_code == 404


SERVER = """
import os, sys
from diffusers_msd.serve import ServeConfig, run
# More cores than there are.
config = ServeConfig(num_cpus=os.cpu_count(), api_key_variable="TEST_SERVING_KEY")
run(sys.argv[1], config, port=int(sys.argv[2]))
"""


def test_a_server_runs_until_it_is_told_to_stop_and_says_no_secret(labels, tmp_path):
    port = free_port()
    environment = {**os.environ, VARIABLE: KEY, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, labels[0], str(port)], stdout=log, stderr=log, env=environment
        )
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180)
            wait_until(lambda: server.poll() is not None or is_ready(client))
            answer = client.post("/v1/images", json={"class_label": 1}, headers={"Authorization": f"Bearer {KEY}"})
            assert images_of(answer) == expected(labels[1], 1, 0)
            server.send_signal(signal.SIGTERM)
            assert server.wait(120) == 0
        finally:
            server.kill()
            log.seek(0)
            text = log.read()
    assert KEY not in text
    with pytest.raises(httpx.ConnectError):
        client.get("/healthz")


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False

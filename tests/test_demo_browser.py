# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The demo as people use it: in headless Chromium, on a page that a real server sends."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
from helpers import edm_scheduler, free_port, tiny_pipeline, tiny_text_pipeline, tiny_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright
from test_serve_http import CONTENT_TYPES, anything, bodies

from diffusers_msd import app
from diffusers_msd.image_requests import ImageRequest, make_images
from diffusers_msd.many_steps import ManyStepTeacher
from diffusers_msd.teachers import save_teacher


pytestmark = pytest.mark.services
ROOT = Path(__file__).parent.parent
PROMPTS = ["a cat", "zebra", "a boat", "moon"]
# Long: nothing here is about speed, and the machine may be busy.
TIMEOUT = 120_000
expect.set_options(timeout=TIMEOUT)


@contextmanager
def headless_chromium():
    quiet = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=quiet.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def browser():
    with headless_chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """The page of a pipeline of labels, with a teacher: (pipeline, teacher, address)."""
    pipe, folder = tiny_pipeline(2), tmp_path_factory.mktemp("teacher")
    save_teacher(folder, tiny_unet(seed=7), edm_scheduler())
    teacher = ManyStepTeacher(folder, pipe, num_inference_steps=2)
    demo = app.launch(pipe, teacher=teacher, block=False)
    yield pipe, teacher, demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """The page of a pipeline of prompts: (pipeline, address)."""
    pipe = tiny_text_pipeline(tmp_path_factory.mktemp("text"), 4)
    demo = app.launch(pipe, prompts=PROMPTS, block=False)
    yield pipe, demo.local_url
    demo.close()


def open_page(browser, url: str, width: int = 1280) -> Page:
    page = browser.new_context(viewport={"width": width, "height": 800}).new_page()
    page.set_default_timeout(TIMEOUT)
    page.goto(url)
    expect(page.get_by_role("button", name="Make images")).to_be_visible()
    return page


@pytest.fixture
def visit(browser):
    """Opens pages that are closed after the test."""
    pages = []

    def visit(url: str, width: int = 1280) -> Page:
        pages.append(open_page(browser, url, width))
        return pages[-1]

    yield visit
    for page in pages:
        page.context.close()


def fill(page: Page, **fields):
    for label, value in fields.items():
        page.get_by_label(label.replace("_", " "), exact=True).first.fill(str(value))


def make(page: Page):
    page.get_by_role("button", name="Make images").click()


def group(page: Page, field: str) -> Locator:
    """The radio buttons below the words `field`."""
    return page.get_by_role("group").filter(has_text=re.compile(rf"^\s*{field}"))


def choose(page: Page, field: str, option: str):
    group(page, field).get_by_role("radio", name=option, exact=True).check()


def gallery(page: Page, name: str, count: int) -> list[np.ndarray]:
    """The pixels of the files behind a gallery's thumbnails."""
    thumbnails = page.locator(f"#{name} .thumbnail-item img")
    expect(thumbnails).to_have_count(count)
    files = [page.request.get(image.get_attribute("src")).body() for image in thumbnails.all()]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def same(got: list, expected: list) -> bool:
    return len(got) == len(expected) and all(np.array_equal(a, np.asarray(b)) for a, b in zip(got, expected))


def test_a_class_is_made_by_its_student_bit_for_bit(visit, labels):
    pipe, _, url = labels
    page = visit(url)
    choose(page, "Class", "3")
    fill(page, Seed_of_the_first_image=11)
    make(page)
    expect(page.get_by_text("Student 1 answered. A table of classes has no cuts")).to_be_visible()
    assert same(gallery(page, "images", 4), make_images(pipe, ImageRequest(3, 11, 4)).images)
    # Eight pixels are shown large, and sharp.
    image = page.locator("#images .thumbnail-item img").first
    assert image.bounding_box()["width"] > 60
    assert image.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"


def test_a_teacher_and_another_student_are_shown_beside(visit, labels):
    pipe, teacher, url = labels
    page, request = visit(url), ImageRequest(0, 0, 4)
    choose(page, "Compare with", "teacher")
    make(page)
    expect(page.locator("#compared")).to_contain_text("teacher, 2 steps")
    assert same(gallery(page, "images", 4), make_images(pipe, request).images)
    assert same(gallery(page, "compared", 4), teacher.make_images(request))
    choose(page, "Compare with", "student 1")
    make(page)
    expect(page.locator("#compared")).to_contain_text("student 1")
    assert same(gallery(page, "compared", 4), make_images(pipe, ImageRequest(0, 0, 4, student=1)).images)
    choose(page, "Compare with", "nothing")
    choose(page, "Student", "student 1")
    make(page)
    expect(page.get_by_text("Student 1 was asked for. The router takes student 0.")).to_be_visible()
    expect(page.locator("#compared")).to_be_hidden()


def test_an_image_can_be_downloaded(visit, labels):
    pipe, _, url = labels
    page = visit(url)
    make(page)
    page.locator("#images .thumbnail-item").first.click()
    with page.expect_download() as download:
        page.locator("#images").get_by_label("Download", exact=True).click()
    assert same([np.asarray(Image.open(download.value.path()))], make_images(pipe, ImageRequest(0)).images)


def test_bad_input_is_a_message_and_the_page_goes_on(visit, prompts):
    pipe, url = prompts
    page = visit(url)
    for fields, message in (
        ({"Prompt": " "}, "prompt: number 0 is empty"),
        ({"Prompt": "a" * 1001}, "prompt: at most 1000 characters expected, got 1001"),
        ({"Prompt": "moon", "Seed of the first image": "-1"}, "seed: a whole number in [0, "),
        ({"Seed of the first image": "9007199254740992"}, "seed: a whole number in [0, "),
        ({"Seed of the first image": "1e300"}, "seed: a whole number expected"),
        ({"Seed of the first image": "0.5"}, "seed: a whole number expected"),
        ({"Seed of the first image": ""}, "seed: a whole number expected"),
    ):
        fill(page, **fields)
        make(page)
        toast = page.locator(".toast-body")
        expect(toast).to_contain_text(message)
        toast.locator(".toast-close").click()
        expect(toast).to_have_count(0)
    fill(page, **{"Seed of the first image": "9007199254740988"})
    make(page)
    expect(page.get_by_text(f"Student {pipe.route('moon')[0]} answered")).to_be_visible()
    images = make_images(pipe, ImageRequest("moon", 9007199254740988, 4)).images
    assert same(gallery(page, "images", 4), images)


def outcome(client: httpx.Client, content: bytes, content_type: str) -> str:
    """What becomes of a request that the page's script would send: the line of a refusal, or the text of an answer."""
    session = {"session_hash": uuid.uuid4().hex}
    content = content.replace(b"SESSION", session["session_hash"].encode())
    answer = client.post("queue/join", content=content, headers={"Content-Type": content_type})
    if answer.status_code != 200:
        # To bytes that are no UTF-8, Gradio's framework has no better answer than 500.
        assert 400 <= answer.status_code < 500 or answer.text == "Internal Server Error"
        return answer.text
    with client.stream("GET", "queue/data", params=session) as events:
        messages = (json.loads(line.removeprefix("data: ")) for line in events.iter_lines() if line)
        last = next(message for message in messages if message["msg"] == "process_completed")
    # None is a page's plain "Error": the page itself cannot send such a thing.
    return last["output"]["data"][0] if last["success"] else last["output"]["error"] or "Error"


def test_any_request_is_answered_or_refused_in_one_line(labels):
    pipe, _, url = labels
    client = httpx.Client(base_url=f"{url}gradio_api/", timeout=TIMEOUT, headers={"Connection": "close"})
    usual = [3, 7, 1, "router", "nothing"]
    of_the_page = {"fn_index": 0, "session_hash": "SESSION"}
    # One or two entries are anything.
    data = st.dictionaries(st.integers(0, 4), anything, min_size=1, max_size=2).map(
        lambda changed: [changed.get(i, value) for i, value in enumerate(usual)]
    )
    requests = st.one_of(
        bodies,
        data.map(lambda values: json.dumps({"data": values, **of_the_page}).encode()),
        anything.map(lambda value: json.dumps({"data": value, **of_the_page}).encode()),
    )

    @settings(max_examples=200, deadline=None)
    @given(requests, st.sampled_from(CONTENT_TYPES))
    def ask(content, content_type):
        text = outcome(client, content, content_type)
        assert text.startswith("**Student ") or "\n" not in text

    ask()
    for path in ("file=/etc/passwd", "file=%2e%2e/%2e%2e/etc/passwd", "file=~/.ssh/id_rsa", "../../etc/passwd"):
        assert client.get(path).status_code in (403, 404)
    assert client.post("upload", files={"files": ("../x.png", b"x" * 100)}).status_code == 413
    request = json.dumps({"data": usual, **of_the_page}).encode()
    assert outcome(client, request, "application/json").startswith("**Student 1** answered")


def test_ten_people_at_once_get_their_own_images(visit, labels):
    pipe, _, url = labels
    pages = [visit(url) for _ in range(10)]
    for i, page in enumerate(pages):
        choose(page, "Class", str(i % 4))
        fill(page, Seed_of_the_first_image=100 + i)
    for page in pages:
        page.get_by_role("button", name="Make images").click(no_wait_after=True)
    for i, page in enumerate(pages):
        expect(page.get_by_text(f"Student {pipe.route(class_labels=i % 4)[0]} answered")).to_be_visible()
        assert same(gallery(page, "images", 4), make_images(pipe, ImageRequest(i % 4, 100 + i, 4)).images)


def test_who_comes_when_the_queue_is_full_is_told_so(visit, monkeypatch):
    monkeypatch.setattr(app, "MAX_WAITING", 1)
    pipe, running, go_on = tiny_pipeline(2), threading.Event(), threading.Event()

    def wait(*_):
        running.set()
        go_on.wait(TIMEOUT / 1000)

    pipe.students[0].register_forward_pre_hook(wait)
    demo = app.launch(pipe, block=False)
    try:
        first, second, third = (visit(demo.local_url) for _ in range(3))
        make(first)
        assert running.wait(TIMEOUT / 1000)
        make(second)
        expect(second.locator("#images")).to_contain_text("queue")
        make(third)
        expect(third.locator(".toast-body")).to_contain_text("currently busy")
        go_on.set()
        for page in (first, second):
            expect(page.get_by_text("Student 0 answered")).to_be_visible()
    finally:
        go_on.set()
        demo.close()


def test_a_phone_needs_no_sideways_scrolling(visit, labels, prompts):
    for *_, url in (labels, prompts):
        page = visit(url, width=390)
        choose(page, "Compare with", "student 1")
        make(page)
        expect(page.locator("#compared .thumbnail-item img")).to_have_count(4)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        outside = "all => all.filter(e => e.getBoundingClientRect().right > 390).length"
        assert page.locator("#compared .thumbnail-item, button, input:not([type=range])").evaluate_all(outside) == 0


def focused(page: Page) -> str:
    """What the focused element is called: its label, or the text around it."""
    return page.evaluate(
        "(document.activeElement.getAttribute('aria-label') || document.activeElement.closest('button, label').innerText)"
    )


def test_labels_are_made_without_a_mouse(visit, labels):
    page, passed = visit(labels[2]), []
    group(page, "Class").get_by_role("radio").first.focus()
    while not passed or passed[-1] != "Make images":
        page.keyboard.press("Tab")
        passed.append(focused(page).strip())
        if passed[-1] in ("2", "student 0"):
            page.keyboard.press("Space")
        assert len(passed) < 30, passed
    order = [passed.index(name) for name in ("2", "Seed of the first image", "automatic", "nothing")]
    assert order == sorted(order)
    page.keyboard.press("Enter")
    expect(page.get_by_text("Student 0 was asked for. The router takes student 1.")).to_be_visible()
    expect(page.locator("#compared .thumbnail-item img")).to_have_count(4)


def test_enter_submits_a_prompt_and_a_seed(visit, prompts):
    pipe, url = prompts
    page = visit(url)
    page.get_by_label("Prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("zebra")
    page.keyboard.press("Enter")
    expect(page.get_by_text(f"Student {pipe.route('zebra')[0]} answered. The nearest cut")).to_be_visible()
    assert same(gallery(page, "images", 4), make_images(pipe, ImageRequest("zebra", 0, 4)).images)
    page.get_by_label("Seed of the first image").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("5")
    with page.expect_response(lambda response: "queue/join" in response.url):
        page.keyboard.press("Enter")
    expect(page.locator("#images img[alt='seed 5']")).to_be_visible()
    assert same(gallery(page, "images", 4), make_images(pipe, ImageRequest("zebra", 5, 4)).images)


def test_the_recipe_of_a_space_runs(visit, tmp_path):
    recipe = (ROOT / "docs" / "recipes" / "space.md").read_text()
    (program,) = re.findall(r"`app\.py`:\n\n```python\n(.*?)```", recipe, re.DOTALL)
    tiny_pipeline(2).save_pretrained(tmp_path / "pipeline")
    (tmp_path / "app.py").write_text(program.replace("your-name/digits-msd", str(tmp_path / "pipeline")))
    port = free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "log").open("wb") as log:
        space = subprocess.Popen(
            [sys.executable, "app.py"], cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        while f"127.0.0.1:{port}" not in (tmp_path / "log").read_text():
            assert space.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        page = visit(f"http://127.0.0.1:{port}")
        expect(page.get_by_role("heading", name="pipeline")).to_be_visible()
        make(page)
        expect(page.get_by_text("Student 0 answered")).to_be_visible()
    finally:
        space.kill()
        space.wait()


def test_the_requirements_of_a_space_are_those_of_the_package():
    recipe = (ROOT / "docs" / "recipes" / "space.md").read_text()
    (listed,) = re.findall(r"`requirements\.txt`.*?```\n(.*?)```", recipe, re.DOTALL)
    setup = (ROOT / "setup.py").read_text()
    core, demo = (re.search(rf"{name} ?\[(.*?)\]", setup, re.DOTALL)[1] for name in ("core =", '"demo":'))
    needed = re.findall(r'"(.*?)"', core + demo)
    # Gradio is the Space's own, of the version in its README.
    assert listed.split() == [line for line in needed if not line.startswith("gradio")]
    (version,) = re.findall(r"sdk_version: (.*)", recipe)
    assert f"gradio=={version}" in (ROOT / "constraints.txt").read_text().splitlines()

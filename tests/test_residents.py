# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""Students loaded when needed: the images of the eager pipeline, at most n nets alive, whatever the threads do."""

import gc
import json
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    generators,
    random_prompts,
    tiny_pipeline,
    tiny_text_pipeline,
    tiny_unet,
)
from hub_server import HubServer
from test_hub import run_python

from diffusers_msd import MultiStudentPipeline
from diffusers_msd.residents import ResidentStudents


K = 4
WEIGHTS = "diffusion_pytorch_model.safetensors"


def load(folder: Path, n: int | None, **kwargs) -> MultiStudentPipeline:
    pipe = MultiStudentPipeline.from_pretrained(folder, max_resident_students=n, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: MultiStudentPipeline, labels: list[int]) -> torch.Tensor:
    return pipe(class_labels=labels, generator=generators(*labels), output_type="latent").images


class Loads(list):
    """The students that were loaded, in order, and the most nets that were alive at once."""

    def __init__(self, residents: ResidentStudents):
        self.load, self.nets, self.most = residents.load, [], 0
        residents.load = self.record

    def record(self, k: int):
        unet = self.load(k)
        self.append(k)
        self.nets.append(weakref.ref(unet))
        self.most = max(self.most, self.alive())
        return unet

    def alive(self) -> int:
        return sum(net() is not None for net in self.nets)


class Task(threading.Thread):
    """A function in a thread of its own, which does not keep the tests from ending if it hangs."""

    def __init__(self, function, *args):
        super().__init__(daemon=True)
        self.function, self.args, self.value = function, args, None
        self.start()

    def run(self):
        try:
            self.value = self.function(*self.args)
        except Exception as error:
            self.value = error

    def result(self):
        """What the function returned or raised."""
        self.join(600)
        assert not self.is_alive()
        return self.value


def at_once(*functions) -> list:
    """What the functions return or raise, each run by a thread of its own, all begun together."""
    ready = threading.Barrier(len(functions))
    tasks = [Task(lambda function=function: (ready.wait(), function())[1]) for function in functions]
    return [task.result() for task in tasks]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "p"
    tiny_pipeline(K).save_pretrained(folder)
    return folder


@pytest.fixture
def own(saved, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "own")


@pytest.fixture(scope="module")
def saved_text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved_text")
    tiny_text_pipeline(folder, K).save_pretrained(folder / "p")
    return folder / "p"


# The same images


@pytest.mark.parametrize("n", range(1, K + 1))
def test_images_of_labels_are_those_of_the_eager_pipeline(saved, n):
    eager, lazy = load(saved, None), load(saved, n)
    for labels in ([0, 1, 2, 3], [3, 0, 2, 0, 1, 3], [2], [1, 1]):
        assert torch.equal(images(lazy, labels), images(eager, labels))
        assert lazy.route(class_labels=labels) == eager.route(class_labels=labels)
    forced = [p(class_labels=[0, 3], student=2, generator=generators(1, 2)).student_indices for p in (eager, lazy)]
    assert forced == [[2, 2], [2, 2]]


def test_images_of_prompts_are_those_of_the_eager_pipeline(saved_text):
    eager, lazy = load(saved_text, None), load(saved_text, 1)
    prompts = random_prompts()[:6]
    made = [p(prompts, generator=generators(*range(6)), output_type="pt") for p in (eager, lazy)]
    assert torch.equal(made[0].images, made[1].images)
    assert made[0].student_indices == made[1].student_indices and len(set(made[1].student_indices)) > 2
    assert lazy.takes_prompts and lazy.latent_shape() == eager.latent_shape() == (4, 8, 8)


def test_students_of_several_steps(saved_text):
    steps = {"timesteps": [999, 499]}
    eager, lazy = (load(saved_text, n, student_timesteps=steps) for n in (None, 2))
    made = [p(random_prompts()[:6], generator=generators(*range(6)), output_type="pt").images for p in (eager, lazy)]
    assert torch.equal(*made)


def test_arguments_are_checked_against_the_configs_with_nothing_loaded(saved):
    pipe = load(saved, 1)
    loads = Loads(pipe.residents)
    with pytest.raises(ValueError, match="class_labels: allowed are 0 ... 3"):
        pipe(class_labels=[4])
    with pytest.raises(ValueError, match="prompt: this pipeline is class-conditional"):
        pipe("a cat")
    with pytest.raises(ValueError, match="latents: a tensor of shape"):
        pipe(class_labels=[0], latents=torch.zeros(1, 1, 4, 4))
    assert list(pipe.students) == [0, 1, 2, 3] and pipe.students[3].config.num_class_embeds == 4
    assert {unet.device.type for unet in pipe.students.values()} == {"meta"}
    assert loads == [] and pipe.residents.resident == []


# Which students are there


def test_the_least_recently_used_one_leaves(saved):
    pipe = load(saved, 2)
    loads = Loads(pipe.residents)
    for label, resident in [(0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (0, [2, 0]), (3, [0, 3])]:
        images(pipe, [label])
        assert pipe.residents.resident == resident
    assert loads == [0, 1, 2, 3] and loads.most == 2


def test_a_call_runs_the_resident_students_first(saved):
    pipe = load(saved, 3)
    loads = Loads(pipe.residents)
    images(pipe, [0, 1, 2, 3])
    # In ascending order, each call would find the one it needs next just gone.
    images(pipe, [0, 1, 2, 3])
    assert loads == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("n", [1, 2])
def test_at_most_n_nets_are_alive_while_eight_threads_call(saved, n):
    eager, lazy = load(saved, None), load(saved, n)
    batches = [[i % 4, (i * 3 + 1) % 4] for i in range(8)] + [[0, 1, 2, 3]]
    expected = [images(eager, batch) for batch in batches]
    # Reference counts alone have to free a net: the collector may come too late.
    gc.disable()
    try:
        loads = Loads(lazy.residents)

        def work(seed: int):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
            return all(torch.equal(images(lazy, batches[i]), expected[i]) for i in order[:3])

        assert at_once(*(lambda seed=seed: work(seed) for seed in range(8))) == [True] * 8
        assert loads.most == n and len(loads) > K
        assert loads.alive() == len(lazy.residents.resident) <= n
    finally:
        gc.enable()


def test_prompts_are_encoded_the_same_in_several_threads(saved_text):
    pipe, prompts = load(saved_text, 2), random_prompts(8)
    expected = [pipe.encode_prompt(prompt)[0] for prompt in prompts]

    def work(i: int):
        return all(torch.equal(pipe.encode_prompt(prompts[i])[0], expected[i]) for _ in range(100))

    assert at_once(*(lambda i=i: work(i) for i in range(8))) == [True] * 8


def test_one_load_serves_all_who_ask_for_the_same_student(saved):
    pipe = load(saved, 1)
    loads, load_one = Loads(pipe.residents), pipe.residents.load
    pipe.residents.load = lambda k: (time.sleep(0.2), load_one(k))[1]
    made = at_once(*[lambda: images(pipe, [1])] * 8)
    assert loads == [1] and all(torch.equal(one, made[0]) for one in made)


# Who waits for whom


@pytest.fixture
def residents():
    """Room for one of three real nets."""
    return ResidentStudents(lambda k: tiny_unet(seed=k), {k: tiny_unet(seed=k) for k in range(3)}, 1)


def test_a_student_in_use_stays_and_the_next_one_waits(residents):
    loads, begun, end = Loads(residents), threading.Event(), threading.Event()

    def hold(unet):
        begun.set()
        assert end.wait(60)
        return loads.alive(), torch.equal(unet.conv_in.weight, tiny_unet(seed=0).conv_in.weight)

    first = Task(residents.use, 0, hold)
    assert begun.wait(60)
    second = Task(residents.use, 1, lambda unet: loads.alive())
    until(residents._turn.locked)
    assert loads == [0] and residents.resident == [0]
    end.set()
    assert first.result() == (1, True) and second.result() == 1
    assert loads == [0, 1] and residents.resident == [1]


def test_who_waits_for_a_place_is_not_overtaken(residents):
    begun, end, order = threading.Event(), threading.Event(), []

    def hold(unet):
        begun.set()
        assert end.wait(60)

    tasks = [Task(residents.use, 0, hold)]
    assert begun.wait(60)
    tasks.append(Task(residents.use, 1, lambda unet: order.append(1)))
    until(residents._turn.locked)
    # Student 0 is there, but who came first would wait for ever if such calls never stopped.
    tasks.append(Task(residents.use, 0, lambda unet: order.append(0)))
    end.set()
    assert [task.result() for task in tasks] == [None] * 3
    assert order == [1, 0]


def test_a_load_does_not_hold_up_the_others(residents):
    residents.limit = 2
    load_one, begun, end = residents.load, threading.Event(), threading.Event()

    def slow(k: int):
        if k == 1:
            begun.set()
            assert end.wait(60)
        return load_one(k)

    residents.load = slow
    task = Task(residents.use, 1, lambda unet: "made")
    assert begun.wait(60)
    assert Task(residents.use, 0, lambda unet: "made").result() == "made" and residents.resident == [0]
    end.set()
    assert task.result() == "made"


def test_an_error_in_use_lets_the_student_go(residents):
    with pytest.raises(ZeroDivisionError):
        residents.use(0, lambda unet: 1 // 0)
    assert residents.use(1, lambda unet: "made") == "made" and residents.resident == [1]


def test_a_student_that_has_left_is_freed_at_once(residents):
    gc.disable()
    try:
        loads = Loads(residents)
        residents.use(0, lambda unet: None)
        # As a thread does that is just leaving `use`.
        place = residents._places[0]
        residents.use(1, lambda unet: None)
        assert loads.alive() == 1 and place.users == 0
    finally:
        gc.enable()


# Damage


@pytest.mark.parametrize("size", [0, 100, -1000])
def test_a_damaged_student_is_named_and_loads_once_it_is_mended(own, size):
    pipe, file = load(own, 2), own / "unet_1" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    loads = Loads(pipe.residents)
    errors = at_once(*[lambda: images(pipe, [1])] * 4, lambda: images(pipe, [0]))
    assert [type(error) for error in errors[:4]] == [ValueError] * 4
    assert all(str(error).startswith("unet_1: ") and "truncated or corrupt" in str(error) for error in errors[:4])
    assert torch.equal(errors[4], images(load(own, 1), [0])) and pipe.residents.resident == [0]
    file.write_bytes(whole)
    assert torch.equal(images(pipe, [1]), images(load(own, None), [1]))
    assert loads == [0, 1] and pipe.residents.resident == [0, 1]


def test_a_failed_load_leaves_nothing_in_memory(residents):
    gc.disable()
    try:
        nets = []

        def broken(k: int):
            nets.append(weakref.ref(unet := tiny_unet(seed=k)))
            raise MemoryError(str(len(list(unet.parameters()))))

        residents.load = broken
        with pytest.raises(MemoryError):
            residents.use(0, lambda unet: None)
        assert nets[0]() is None
    finally:
        gc.enable()


def test_weights_of_another_net_are_named(own):
    tiny_unet(block_out_channels=(8, 24)).save_pretrained(own / "other")
    (own / "other" / WEIGHTS).replace(own / "unet_2" / WEIGHTS)
    with pytest.raises(ValueError, match="unet_2: the weights in .* do not fit its config.json"):
        images(load(own, 1), [2])


def test_what_does_not_fit_is_refused_before_anything_is_loaded(own):
    config = json.loads((own / "unet_3/config.json").read_text())
    (own / "unet_3/config.json").write_text(json.dumps({**config, "sample_size": 16}))
    with pytest.raises(ValueError, match="unet_3: sample_size is 16, the other students have 8"):
        load(own, 1)
    (own / "unet_3/config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="unet_3: its config is of a AutoencoderKL"):
        load(own, 1)


def test_what_is_missing_is_named_before_anything_is_loaded(own):
    (own / "unet_1" / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="unet_1: .* holds no diffusion_pytorch_model.safetensors"):
        load(own, 1)
    shutil.rmtree(own / "unet_1")
    with pytest.raises(FileNotFoundError, match="unet_1: .* has no readable unet_1/config.json"):
        load(own, 1)
    assert list(load(own, 1, unet_1=None).students) == [0, 2, 3]
    (own / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="pretrained_model_name_or_path: "):
        load(own, 1)


# How they are loaded


def test_dtype_and_later_moves_hold_for_students_loaded_later(saved):
    eager, lazy = load(saved, None), load(saved, 1, dtype={"unet_1": torch.bfloat16})
    seen = [lazy.use_student(k, lambda unet: unet.dtype) for k in range(3)]
    assert seen == [unet.dtype for unet in list(lazy.students.values())[:3]]
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    assert lazy.to(dtype=torch.bfloat16, silence_dtype_warnings=True) is lazy and lazy.dtype == torch.bfloat16
    eager.to(torch.bfloat16)
    # Student 2 was there and has to be cast, the others are loaded later.
    assert lazy.use_student(2, lambda unet: unet.dtype) == torch.bfloat16
    assert torch.equal(images(lazy, [0, 1, 2, 3]), images(eager, [0, 1, 2, 3]))


def test_a_move_during_a_load_is_not_missed(residents):
    residents.limit, load_one, begun, end = 2, residents.load, threading.Event(), threading.Event()

    def slow(k: int):
        begun.set()
        assert k == 0 or end.wait(60)
        return load_one(k)

    residents.load = slow
    residents.use(0, lambda unet: None)
    begun.clear()
    task = Task(residents.use, 1, lambda unet: (unet.device.type, unet.dtype))
    assert begun.wait(60)
    # The only other device that every machine has.
    residents.to("meta", torch.bfloat16)
    end.set()
    assert task.result() == residents.use(0, lambda unet: (unet.device.type, unet.dtype)) == ("meta", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_students_are_loaded_to_the_device_of_the_pipeline(saved):
    eager, lazy = load(saved, None).to("cuda"), load(saved, 1)
    images(lazy, [0])
    lazy.to("cuda")
    for k in range(K):
        assert lazy.use_student(k, lambda unet: unet.device.type) == "cuda"
    assert torch.equal(images(lazy, [0, 1, 2, 3]), images(eager, [0, 1, 2, 3]))


def test_variants_and_shards(tmp_path):
    tiny_pipeline(2).save_pretrained(tmp_path / "p", max_shard_size="10KB")
    assert len(list((tmp_path / "p/unet_0").glob("*.safetensors"))) > 1
    assert torch.equal(*(images(load(tmp_path / "p", n), [0, 3]) for n in (None, 1)))
    index = tmp_path / "p/unet_1" / "diffusion_pytorch_model.safetensors.index.json"
    whole = index.read_text()
    index.write_text(whole[:50])
    with pytest.raises(ValueError, match="unet_1: .* is truncated or corrupt"):
        load(tmp_path / "p", 1)
    index.write_text(whole)
    half = tiny_pipeline(2).to(torch.float16)
    half.unet_0.save_pretrained(tmp_path / "p/unet_0", variant="fp16")
    # Student 1 has no such variant; diffusers takes what there is, one by one.
    eager, lazy = (load(tmp_path / "p", n, variant="fp16", dtype=torch.float64) for n in (None, 1))
    for k, unet in eager.students.items():
        assert lazy.use_student(k, lambda other: torch.equal(other.conv_in.weight, unet.conv_in.weight))
    assert not torch.equal(eager.unet_0.conv_in.weight, load(tmp_path / "p", None).unet_0.conv_in.weight.double())


def test_students_that_are_left_out_or_given(saved):
    pipe = load(saved, 2, unet_1=None)
    assert list(pipe.students) == [0, 2, 3]
    with pytest.raises(ValueError, match="label 1 belongs to student 1, which is absent"):
        pipe(class_labels=[1])
    with pytest.raises(ValueError, match="max_resident_students: an integer in 1 ... 3"):
        load(saved, 4, unet_1=None)
    net = tiny_unet(seed=1)
    for other in (load(saved, 1, unet_1=net), pipe):
        loads = Loads(other.residents)
        other.add_student(1, net)
        assert other.students[1] is net
        assert torch.allclose(images(other, [0, 1]), images(load(saved, None), [0, 1]), atol=1e-5) and loads == [0]


def test_a_student_left_out_at_the_save_stays_out(saved, tmp_path):
    MultiStudentPipeline.from_pretrained(saved, unet_2=None).save_pretrained(tmp_path / "p")
    assert list(load(tmp_path / "p", 1).students) == [0, 1, 3]
    index = json.loads((tmp_path / "p/model_index.json").read_text())
    del index["unet_2"]
    (tmp_path / "p/model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="router: it has 4 parts, but .* has no unet_2"):
        load(tmp_path / "p", 1)


@pytest.mark.parametrize("n", [0, -1, K + 1, True, 2.0, "2"])
def test_a_number_of_residents_that_is_none_is_refused(saved, n):
    with pytest.raises(ValueError, match="^max_resident_students: an integer in 1 ... 4"):
        load(saved, n)


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("save_pretrained", ["somewhere"]),
        ("push_to_hub", ["somebody/something"]),
        ("enable_model_cpu_offload", []),
        ("enable_sequential_cpu_offload", []),
        ("enable_group_offload", ["cpu"]),
        ("enable_attention_slicing", []),
        ("enable_xformers_memory_efficient_attention", []),
    ],
)
def test_what_needs_all_students_is_refused(saved, tmp_path, monkeypatch, method, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=": it needs all students; load without max_resident_students"):
        getattr(load(saved, 2), method)(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_options_and_pipelines_that_would_lose_students_are_refused(saved):
    with pytest.raises(ValueError, match="device_map: not possible with max_resident_students"):
        load(saved, 1, device_map="balanced")
    with pytest.raises(ValueError, match="dtype: a torch.dtype"):
        load(saved, 1, dtype="float16")
    with pytest.raises(ValueError, match="pipeline: it was loaded with max_resident_students"):
        MultiStudentPipeline.from_pipe(load(saved, 1))


# The Hub


ROUTED = """
from diffusers_msd import MultiStudentPipeline
from helpers import generators

for options in {options}:
    pipe = MultiStudentPipeline.from_pretrained("tester/p", max_resident_students=1, **options)
    for k in (0, 2, 0):
        pipe({condition}, student=k, generator=generators(0), output_type="latent")
"""


def test_only_students_that_are_routed_to_are_downloaded(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "p")
    tiny_pipeline(K).to(torch.float16).save_pretrained(folder, variant="fp16")
    # The second one finds all it needs in the cache of the first.
    options = [
        {"cache_dir": "plain"},
        {"cache_dir": "plain", "local_files_only": True},
        {"cache_dir": "fp16", "variant": "fp16", "unet_3": None},
    ]
    # Configs of the other students have the same content, so that the client does not ask for it again.
    small = ["model_index.json", "scheduler/scheduler_config.json", "router/config.json", "unet_0/config.json"]
    weights = [f"unet_{k}/{name}" for k in (0, 2) for name in (WEIGHTS, WEIGHTS.replace(".", ".fp16."))]
    with HubServer() as hub:
        hub.add_folder("tester/p", folder)
        code = ROUTED.format(options=options, condition="class_labels=[0]")
        run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
        assert sorted(name for _, name in hub.downloads) == sorted(small * 2 + weights)


def test_a_student_of_prompts_that_is_not_on_the_hub(saved_text, tmp_path):
    code = ROUTED.format(options=[{}], condition="'word'")
    code += "try:\n    pipe('word', student=1)\nexcept FileNotFoundError as error:\n    print(error)\n"
    with HubServer() as hub:
        hub.add_folder("tester/p", saved_text)
        del hub.repos["tester/p"][f"unet_1/{WEIGHTS}"]
        printed = run_python(code, tmp_path, **hub.environment(tmp_path / "home"))
        downloaded = {name for _, name in hub.downloads if name.endswith(WEIGHTS)}
    assert downloaded == {f"{name}/{WEIGHTS}" for name in ("router", "unet_0", "unet_2", "vae")}
    assert printed.startswith("unet_1: ")

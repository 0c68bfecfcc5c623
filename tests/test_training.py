# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import edm_scheduler, tiny_unet
from safetensors.torch import load_file

from diffusers_msd.batches import global_batch
from diffusers_msd.data import ImageDataset
from diffusers_msd.denoiser import denoiser_for
from diffusers_msd.draws import Draws, derive_seed
from diffusers_msd.pairs import PairDataset, generate_pairs
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import DenoisingTurn, build_stage
from diffusers_msd.training import Trainer
from diffusers_msd.training_config import TrainingConfig, create_accelerator


SCHEDULE = NoiseSchedule.from_scheduler(edm_scheduler())
NUM_ITEMS = 13
# The stages, their variants, and the training of a teacher (with dropout, which uses global numbers).
CASES = ("teacher", "tsm", "dm", "dm without pairs", "adm", "adm after a warm-up")
STEPS = 8


# ------------------------------------------------------------------ tiny runs, also for test_checkpoint


class Images(ImageDataset):
    """Random 8x8 images of 4 classes; `at(call, images)` sees and may change each batch that is read."""

    def __init__(self, at=None):
        pixels = torch.randn(NUM_ITEMS, 1, 8, 8, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
        calls = iter(range(10**6))

        def read(rows):
            batch = pixels[rows]
            return batch if at is None else at(next(calls), batch)

        super().__init__(read, torch.arange(NUM_ITEMS) % 4, 4, (1, 8, 8))


class Pairs(PairDataset):
    """Teacher pairs, with `at` as for `Images`."""

    def __init__(self, path, at=None):
        super().__init__(path)
        self.at, self.calls = at, iter(range(10**6))

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        return batch if self.at is None else {**batch, "images": self.at(next(self.calls), batch["images"])}


def make_pairs(folder: Path) -> Path:
    settings = {"conditions": torch.arange(4), "image_shape": (1, 8, 8), "fingerprint": "f" * 64, "num_steps": 2}
    generate_pairs(denoiser_for(tiny_unet(), SCHEDULE), folder, NUM_ITEMS, progress=False, **settings)
    return folder


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"))


def make_turns(case: str, seed: int = 0, interval: int = 3):
    """Fresh networks; another seed gives other starting weights of everything that is trained."""
    if case == "teacher":
        return [DenoisingTurn(denoiser_for(tiny_unet(seed=seed, dropout=0.2).train(), SCHEDULE))]
    student, fake_score = (denoiser_for(tiny_unet(seed=seed + i), SCHEDULE) for i in (1, 2))
    teacher = denoiser_for(tiny_unet(seed=100), SCHEDULE)
    variant = {"dm without pairs": {"regression_weight": 0.0}, "adm after a warm-up": {"gan_warmup_steps": 2}}
    config = StageConfig(student_update_interval=[interval], **variant.get(case, {}))
    torch.manual_seed(seed)
    return build_stage(case.split()[0], student, teacher, fake_score, torch.arange(4), config)


def make_config(**changes) -> TrainingConfig:
    """Neither logging nor an epoch (13 items) ends where a checkpoint is made."""
    settings = {
        "train_batch_size": 4,
        "max_train_steps": [STEPS],
        "learning_rate": [1e-3],
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "logging_steps": 3,
        "checkpointing_steps": 5,
        "checkpoints_total_limit": None,
        "report_to": "none",
    }
    return TrainingConfig(**{**settings, **changes})


def make_trainer(case, folder, datasets, start=0, interval=3, validate=None, **changes) -> Trainer:
    config = make_config(**changes)
    turns = make_turns(case, start, interval)
    accelerator = create_accelerator(config, Path(folder))
    return Trainer(accelerator, turns, datasets, config, folder, case, validate=validate)


@pytest.fixture
def datasets(pairs_dir):
    return {"images": Images(), "pairs": PairDataset(pairs_dir)}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file below a folder."""
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def different(a: Path, b: Path) -> list[str]:
    """The names of tensors that are not bit for bit the same in two folders."""
    x, y = tensors_in(a), tensors_in(b)
    assert x.keys() == y.keys() and x
    return [name for name in x if not torch.equal(x[name], y[name])]


def parts_of(names: list[str]) -> set[str]:
    """The networks and optimizers that tensors belong to."""
    return {name.split("/")[0].split(":")[0] for name in names}


def state_of(checkpoint: Path) -> dict:
    state = json.loads((checkpoint / "state.json").read_text())
    del state["seconds"], state["account"]["peak_memory"]
    return state


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def assert_same_run(a: Path, b: Path, step: int = STEPS):
    """Networks, EMA, optimizers, schedules, counters, finished weights and logged losses are bit for bit the same."""
    assert different(a / f"checkpoint-{step}", b / f"checkpoint-{step}") == []
    assert different(a / "final", b / "final") == []
    assert state_of(a / f"checkpoint-{step}") == state_of(b / f"checkpoint-{step}")
    assert log_of(a) == log_of(b)


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(case, tmp_path, datasets):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer(case, whole, datasets, **split).fit()
    # As after a crash: the last checkpoint is of step 5, the log already goes beyond it.
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    shutil.copy(whole / "log.jsonl", resumed)
    before = hashes(resumed / "checkpoint-5")
    # Other starting weights, to show that all of them are read back.
    make_trainer(case, resumed, datasets, start=50, resume_from_checkpoint="latest", **split).fit()

    assert_same_run(whole, resumed)
    assert [line["step"] for line in log_of(whole)] == [3, 6, 8]
    assert hashes(resumed / "checkpoint-5") == before
    # What was compared did move after the checkpoint.
    moved = different(resumed / "checkpoint-5", resumed / f"checkpoint-{STEPS}")
    saved = {path.name for path in (resumed / "checkpoint-5").iterdir()} - {"state.json"}
    assert parts_of(moved) == saved


@pytest.mark.parametrize("case, names", [
    ("teacher", {"unet", "unet_ema", "optimizer_teacher.safetensors"}),
    ("tsm", {"student", "student_ema", "optimizer_student.safetensors"}),
    ("dm", {"student", "student_ema", "fake_score", "optimizer_student.safetensors",
            "optimizer_critic.safetensors"}),
    ("adm", {"student", "student_ema", "fake_score", "discriminator", "optimizer_student.safetensors",
             "optimizer_critic.safetensors"}),
])  # fmt: skip
def test_checkpoint_holds_every_trained_network_and_optimizer(case, names, tmp_path, datasets):
    make_trainer(case, tmp_path, datasets, max_train_steps=[1]).fit()
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} == names | {"state.json"}


def test_run_without_ema_resumes_bit_for_bit_too(tmp_path, datasets):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    make_trainer("tsm", whole, datasets, ema_decay=0.0).fit()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    shutil.copy(whole / "log.jsonl", resumed)
    make_trainer("tsm", resumed, datasets, start=50, ema_decay=0.0, resume_from_checkpoint="checkpoint-5").fit()
    assert_same_run(whole, resumed)
    assert not (whole / "checkpoint-5" / "student_ema").exists()


def measure(step, model):
    """A validation that depends on the averaged weights."""
    return {"norm": sum(p.double().square().sum().item() for p in model.parameters())}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_writes_a_checkpoint_and_resumes_bit_for_bit(signum, tmp_path, datasets):
    """Also the numbers of the validation that is due at the very step of the interruption."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = {"validation_steps": 2, "validate": measure}
    make_trainer("adm", whole, datasets, **settings).fit()
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(call, images):
        if call == 5:
            signal.raise_signal(signum)
        return images

    trainer = make_trainer("adm", broken, {**datasets, "images": Images(interrupt)}, **settings)
    with pytest.raises(
        KeyboardInterrupt, match="interrupted at step 6; continue with --resume_from_checkpoint latest"
    ):
        trainer.fit()
    assert (broken / "checkpoint-6").is_dir() and not (broken / "final").exists()
    assert signal.getsignal(signal.SIGINT) is handler

    make_trainer("adm", broken, datasets, start=50, resume_from_checkpoint="latest", **settings).fit()
    assert_same_run(whole, broken)
    assert [line["step"] for line in log_of(broken) if "validation/norm" in line] == [2, 4, 6, 8]


def test_interrupt_during_the_last_validation_is_not_lost(tmp_path, datasets):
    def interrupt(step, model):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer("tsm", tmp_path, datasets, max_train_steps=[2], validate=interrupt).fit()
    assert (tmp_path / "checkpoint-2").is_dir()


def test_interrupt_reaches_a_run_with_data_workers(tmp_path, datasets):
    """Ctrl-C goes to the workers as well; they must live until the step is finished."""

    def interrupt(step, model):
        # Step 2 of 40: the workers are reading ahead.
        for worker in torch.multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    workers = {"dataloader_num_workers": 1, "validation_steps": 2, "max_train_steps": [40]}
    with pytest.raises(KeyboardInterrupt, match="continue with"):
        make_trainer("tsm", tmp_path, datasets, validate=interrupt, **workers).fit()
    assert (tmp_path / "checkpoint-3").is_dir()


def test_data_workers_change_nothing(tmp_path, datasets):
    a, b = tmp_path / "a", tmp_path / "b"
    make_trainer("adm", a, datasets, max_train_steps=[4]).fit()
    make_trainer("adm", b, datasets, max_train_steps=[4], dataloader_num_workers=2).fit()
    assert_same_run(a, b, step=4)


# ------------------------------------------------------------------ accumulation, order of the data


@pytest.mark.parametrize("case", ["tsm", "dm", "dm without pairs", "adm"])
def test_accumulated_micro_batches_equal_one_big_batch(case, tmp_path, datasets):
    # A large epsilon: Adam would blow rounding errors of vanishing gradients up to the size of the learning rate.
    settings = {"adam_epsilon": 1e-2, "interval": 2, "max_train_steps": [4], "checkpointing_steps": 1}
    make_trainer(case, tmp_path / "big", datasets, train_batch_size=8, **settings).fit()
    small = {"train_batch_size": 2, "gradient_accumulation_steps": 4}
    make_trainer(case, tmp_path / "small", datasets, **small, **settings).fit()

    first = [tensors_in(tmp_path / name / "checkpoint-1") for name in ("big", "small")]
    gradients = [{k: v / 0.1 for k, v in t.items() if k.endswith("exp_avg")} for t in first]
    largest = max(v.abs().max() for v in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * largest.item(), msg=name)
    big, small = (tensors_in(tmp_path / name / "final") for name in ("big", "small"))
    start = tensors_in(tmp_path / "big" / "checkpoint-1")
    for name, weight in big.items():
        torch.testing.assert_close(small[name], weight, rtol=0, atol=1e-6, msg=name)
    # The agreement is far below what the steps changed.
    assert max((big[n] - start[n]).abs().max() for n in big) > 1e-3
    for line, other in zip(log_of(tmp_path / "big"), log_of(tmp_path / "small"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_every_epoch_has_every_item_once_in_another_order():
    run = [i for position in range(26) for i in global_batch(NUM_ITEMS, 4, position, ("order",))]
    epochs = [run[i : i + NUM_ITEMS] for i in range(0, len(run), NUM_ITEMS)]
    assert all(sorted(epoch) == list(range(NUM_ITEMS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert global_batch(NUM_ITEMS, 4, 0, ("other",)) != global_batch(NUM_ITEMS, 4, 0, ("order",))


def test_a_batch_may_be_larger_than_the_dataset():
    batch = global_batch(3, 7, 0, ())
    assert len(batch) == 7 and sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_draws_of_parts_are_the_rows_of_the_whole():
    def draw(rows):
        draws = Draws((0, "dm", 3), 8, rows)
        return draws.normal(1, 2, 2), draws.index(0, 5), draws.normal()

    whole, parts = draw(slice(0, 8)), [draw(slice(i, i + 2)) for i in range(0, 8, 2)]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)
    assert whole[1].min() >= 0 and whole[1].max() <= 5


def test_seeds_of_different_keys_differ():
    keys = [("a", 1), ("a", 2), ("a1",), (1, "a"), ("a", "1"), (11,), (1, 1)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


# ------------------------------------------------------------------ NaN and infinity


def poison(value: float, calls):
    """Replaces the first image of the batches numbered `calls`."""

    def at(call, images):
        images = images.clone()
        if call in calls:
            images[0] = value
        return images

    return at


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all networks, averages and optimizer states in memory."""
    tensors = {}
    for turn in trainer.turns:
        for name, model in turn.models().items():
            tensors |= {f"{name}: {key}": value for key, value in model.state_dict().items()}
        for index, state in trainer.optimizers[turn.name].state_dict()["state"].items():
            tensors |= {f"optimizer of the {turn.name}: {index}.{key}": value for key, value in state.items()}
    tensors |= {f"ema: {i}": value for i, value in enumerate(trainer.ema.shadow_params)}
    tensors["ema: steps"] = torch.tensor(trainer.ema.optimization_step)
    return {name: value.clone() for name, value in tensors.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() <= after.keys()
    return {name.split(":")[0] for name in after if name not in before or not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "infinite gradient"])
def test_nonfinite_update_is_skipped_counted_and_logged(kind, tmp_path, capsys):
    value = {"nan loss": float("nan"), "infinite loss": float("inf")}.get(kind)
    poisoned = poison(value, set() if value is None else {2})
    snapshots = []

    def at(call, images):
        snapshots.append(snapshot(trainer))
        return poisoned(call, images)

    settings = {"max_train_steps": [5], "lr_warmup_steps": 0, "logging_steps": 1}
    trainer = make_trainer("tsm", tmp_path, {"images": Images(at)}, **settings)
    if value is None:
        backward = iter(range(100))
        weight = trainer.main_model.conv_in.weight
        weight.register_hook(lambda g: g * float("inf") if next(backward) == 2 else g)
    trainer.fit()

    # The third step changes neither weights, nor EMA, nor optimizer (its step count included).
    everything = {"student", "optimizer of the student", "ema"}
    assert [changed(a, b) for a, b in zip(snapshots, snapshots[1:])] == [everything, everything, set(), everything]
    lines = log_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert ["student/loss" in line for line in lines] == [True, True, False, True, True]
    assert all(torch.isfinite(t).all() for t in tensors_in(tmp_path / "final").values())
    counts = json.loads((tmp_path / "final" / "summary.json").read_text())["skipped"]
    assert counts == {"student": {"total": 1, "in_a_row": 0}}
    output = capsys.readouterr()
    bad = "grad_norm" if value is None else "loss, grad_norm"
    assert f"tsm: step 2: student update skipped, not finite: {bad}" in output.out + output.err


def test_nonfinite_students_turn_leaves_the_critics_alone(tmp_path, datasets, pairs_dir):
    snapshots = []
    poisoned = poison(float("nan"), {1})

    def at(call, images):
        snapshots.append(snapshot(trainer))
        return poisoned(call, images)

    datasets = {**datasets, "pairs": Pairs(pairs_dir, at)}
    trainer = make_trainer("dm", tmp_path, datasets, interval=1, max_train_steps=[3])
    trainer.fit()
    assert changed(snapshots[1], snapshots[2]) == {"fake_score", "optimizer of the critic"}
    assert state_of(tmp_path / "checkpoint-3")["skipped"] == {
        "student": {"total": 1, "in_a_row": 0},
        "critic": {"total": 0, "in_a_row": 0},
    }


def test_training_stops_after_n_nonfinite_updates_and_keeps_the_last_checkpoint(tmp_path, datasets):
    seen = {}

    def at(call, images):
        if call == 3:
            seen.update(hashes(tmp_path / "checkpoint-3"))
        return images if call < 3 else images * float("nan")

    trainer = make_trainer(
        "tsm", tmp_path, {"images": Images(at)}, checkpointing_steps=3, max_nonfinite_steps=4, max_train_steps=[30]
    )
    with pytest.raises(FloatingPointError, match="4 times in a row, up to step 6;.*--learning_rate"):
        trainer.fit()
    assert seen and hashes(tmp_path / "checkpoint-3") == seen
    assert not (tmp_path / "final").exists()


def test_no_checkpoint_of_a_stretch_of_nonfinite_updates_replaces_the_last_good_one(tmp_path, datasets):
    """Weights that give NaN may be what is broken; with a limit of 1, saving them would delete the good ones."""
    images = Images(poison(float("nan"), range(3, 100)))
    trainer = make_trainer(
        "tsm",
        tmp_path,
        {"images": images},
        checkpointing_steps=2,
        checkpoints_total_limit=1,
        max_nonfinite_steps=4,
        max_train_steps=[30],
    )
    with pytest.raises(FloatingPointError):
        trainer.fit()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_count_of_nonfinite_updates_survives_a_resume(tmp_path, datasets):
    """Else a run that is killed and resumed again and again would never stop."""
    bad = Images(poison(float("nan"), range(2, 100)))

    def interrupt(step, model):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(
            "tsm", tmp_path, {"images": bad}, validate=interrupt, validation_steps=3, max_nonfinite_steps=4
        ).fit()
    bad = Images(poison(float("nan"), range(100)))
    with pytest.raises(FloatingPointError, match="4 times in a row, up to step 5"):
        make_trainer("tsm", tmp_path, {"images": bad}, resume_from_checkpoint="latest", max_nonfinite_steps=4).fit()


# ------------------------------------------------------------------ EMA, schedules, logs


def test_final_weights_are_the_average_and_training_goes_on_from_the_plain_ones(tmp_path, datasets):
    make_trainer("tsm", tmp_path, datasets, ema_decay=0.9, checkpointing_steps=1, max_train_steps=[3]).fit()
    plain = [tensors_in(tmp_path / f"checkpoint-{s}" / "student") for s in (1, 2, 3)]
    expected = tensors_in_start()
    # diffusers' warm-up of the decay: (1 + n) / (10 + n) for the n-th update, from 0; the first copies.
    for n, weights in enumerate(plain, start=1):
        decay = 0.0 if n == 1 else min(0.9, n / (9 + n))
        expected = {k: decay * expected[k] + (1 - decay) * weights[k] for k in weights}
    final = tensors_in(tmp_path / "final" / "student")
    for name, weight in final.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)
    assert different(tmp_path / "final" / "student", tmp_path / "checkpoint-3" / "student_ema") == []
    assert different(tmp_path / "final" / "student", tmp_path / "checkpoint-3" / "student") != []


def tensors_in_start():
    name = "diffusion_pytorch_model.safetensors"
    return {f"{name}: {key}": value for key, value in tiny_unet(seed=1).state_dict().items()}


@pytest.mark.parametrize("case, steps", [("dm", [1, 4, 7]), ("adm", [1, 4, 7]), ("adm after a warm-up", [3, 6])])
def test_students_turn_runs_at_its_interval_only_and_the_critics_always(case, steps, tmp_path, datasets):
    make_trainer(case, tmp_path, datasets, interval=3, max_train_steps=[7], logging_steps=1).fit()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines if "student/loss" in line] == steps
    assert [line["step"] for line in lines if "critic/loss" in line] == list(range(1, 8))


def test_learning_rate_warms_up_and_follows_the_cosine(tmp_path, datasets):
    make_trainer("tsm", tmp_path, datasets, logging_steps=1, max_train_steps=[6], lr_warmup_steps=2).fit()
    rates = [line["lr"] for line in log_of(tmp_path)]
    assert rates[0] == pytest.approx(0.5e-3) and rates[1] == pytest.approx(1e-3)
    assert rates[1:] == sorted(rates[1:], reverse=True) and rates[-1] == pytest.approx(0, abs=1e-12)


def test_gradient_is_clipped_to_the_norm(tmp_path, datasets):
    make_trainer("tsm", tmp_path, datasets, max_train_steps=[1], max_grad_norm=1e-3).fit()
    tensors = tensors_in(tmp_path / "checkpoint-1")
    first_moments = [v for k, v in tensors.items() if k.endswith("exp_avg")]
    norm = torch.stack([(v / 0.1).norm() for v in first_moments]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert log_of(tmp_path)[0]["student/grad_norm"] > 1e-2


@pytest.mark.parametrize("case", ["dm", "adm"])
def test_gradient_checkpointing_changes_no_gradient(case, tmp_path, datasets):
    settings = {"max_train_steps": [2], "interval": 1}
    make_trainer(case, tmp_path / "plain", datasets, **settings).fit()
    make_trainer(case, tmp_path / "saving", datasets, gradient_checkpointing=True, **settings).fit()
    plain, saving = (tensors_in(tmp_path / name / "final") for name in ("plain", "saving"))
    for name in plain:
        torch.testing.assert_close(saving[name], plain[name], rtol=0, atol=1e-6, msg=name)


def test_training_leaves_the_teacher_as_it_was(tmp_path, datasets):
    trainer = make_trainer("adm", tmp_path, datasets, interval=1, max_train_steps=[3])
    teacher = trainer.turns[0].frozen["teacher"]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer.fit()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("changes, name", [
    ({"train_batch_size": 0}, "train_batch_size"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ({"logging_steps": 0}, "logging_steps"),
    ({"checkpointing_steps": 0}, "checkpointing_steps"),
    ({"max_train_steps": [0]}, "max_train_steps"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"max_nonfinite_steps": 0}, "max_nonfinite_steps"),
    ({"ema_decay": 1.0}, "ema_decay"),
    ({"checkpoints_total_limit": 0}, "checkpoints_total_limit"),
    ({"mixed_precision": "fp16"}, "mixed_precision"),
    ({"lr_scheduler": "cosinus"}, "lr_scheduler"),
])  # fmt: skip
def test_setting_out_of_range_is_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}: .*{next(iter(changes.values()))!r}".replace("[", r"\[")):
        make_config(**changes)


@pytest.mark.parametrize("changes, name", [
    ({"student_update_interval": [0]}, "student_update_interval"),
    ({"dm_t_min": 0.9, "dm_t_max": 0.1}, "dm_t_min, dm_t_max"),
    ({"regression_weight": -1.0}, "regression_weight"),
    ({"regression_distance": "l3"}, "regression_distance"),
])  # fmt: skip
def test_stage_setting_out_of_range_is_named(changes, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        StageConfig(**changes)

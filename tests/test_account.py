# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""The accounts that runs and pairs leave, and their sums."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from helpers import edm_scheduler, tiny_pipeline, tiny_unet
from test_training import STEPS, Images, different, make_config, make_pairs, make_trainer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusers_msd.account import add_accounts, latency, storage_bytes
from diffusers_msd.denoiser import denoiser_for
from diffusers_msd.evaluation import model_row
from diffusers_msd.memory import estimate_memory, without_data
from diffusers_msd.pairs import PairDataset, generate_pairs, pairs_account
from diffusers_msd.runs import PAIRS_FILE, RUN_FILE, training_record
from diffusers_msd.schedule import NoiseSchedule
from diffusers_msd.scores import markdown_table
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.stages import build_stage
from diffusers_msd.teachers import save_teacher


SCHEDULE = NoiseSchedule.from_scheduler(edm_scheduler())
# What differs from run to run.
MEASURED = {"seconds", "peak_memory"}


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    return make_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def datasets(pairs_dir):
    return {"images": Images(), "pairs": PairDataset(pairs_dir)}


def summary(folder) -> dict:
    return json.loads((folder / "final" / "summary.json").read_text())


def counted(account: dict) -> dict:
    return {key: value for key, value in account.items() if key not in MEASURED}


# ------------------------------------------------------------------ of a stage


def estimated_flops(stage: str) -> dict[str, int]:
    """Of a run of each turn, found without weights."""
    config = tiny_unet().config
    with torch.device("meta"):
        models = [UNet2DModel.from_config(config).eval() for _ in range(3)]
    nets = [denoiser_for(without_data(model), SCHEDULE) for model in models]
    turns = build_stage(stage, *nets, torch.arange(4), StageConfig())
    return {
        name: turn["flops"] for name, turn in estimate_memory(turns, make_config(), torch.arange(4))["turns"].items()
    }


@pytest.mark.parametrize("stage", ["tsm", "dm", "adm"])
def test_a_stage_writes_what_its_turns_cost_as_often_as_they_ran(stage, tmp_path, datasets):
    """Eight iterations of batch 4; at interval 3 the student has its turn in three of them."""
    make_trainer(stage, tmp_path, datasets, interval=3).fit()
    account = summary(tmp_path)
    runs = {"student": STEPS} if stage == "tsm" else {"student": 3, "critic": STEPS}
    assert account["flops"] == sum(runs[turn] * flops for turn, flops in estimated_flops(stage).items())
    critic = {"forward": 4 * STEPS, "backward": 4 * STEPS}
    assert (
        account["passes"]
        == {
            "tsm": {"teacher": {"forward": 32}, "student": {"forward": 32, "backward": 32}},
            "dm": {
                "student": {"forward": 2 * 12 + 32, "backward": 2 * 12},
                "teacher": {"forward": 12},
                "fake_score": {"forward": 12 + critic["forward"], "backward": critic["backward"]},
            },
            "adm": {
                "student": {"forward": 12 + 32, "backward": 12},
                "teacher": {"forward": 12},
                "fake_score": {
                    "forward": 12 + critic["forward"],
                    "backward": critic["backward"],
                    "encoder_forward": 12 + 2 * 32,
                    "encoder_backward": 12 + 2 * 32,
                },
                "discriminator": {"forward": 12 + 2 * 32, "backward": 12 + 2 * 32},
            },
        }[stage]
    )
    assert account["images_seen"] == {"tsm": {"images": 32}, "dm": {"pairs": 12}, "adm": {"images": 32}}[stage]
    assert account["steps"] == STEPS and account["seconds"] > 0 and account["processes"] == 1
    assert account["peak_memory"]["process_resident"] > 50e6 and len(account["hardware"]) == 1


@pytest.mark.parametrize("case", ["dm", "adm after a warm-up"])
def test_a_resumed_run_leaves_the_account_of_the_uninterrupted_one(case, tmp_path, datasets):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    make_trainer(case, whole, datasets).fit()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")
    state = json.loads((resumed / "checkpoint-5" / "state.json").read_text())
    state["account"]["peak_memory"]["process_resident"] = 10**15
    (resumed / "checkpoint-5" / "state.json").write_text(json.dumps(state))
    make_trainer(case, resumed, datasets, start=50, resume_from_checkpoint="latest").fit()
    assert counted(summary(resumed)) == counted(summary(whole))
    # The largest of both jobs.
    assert summary(resumed)["peak_memory"] == {"process_resident": 10**15}


def test_a_run_resumed_from_a_checkpoint_of_an_earlier_version_leaves_out_what_it_cannot_know(tmp_path, datasets):
    def resume(folder, step, interval):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        path = folder / f"checkpoint-{step}" / "state.json"
        state = json.loads(path.read_text())
        del state["account"]
        path.write_text(json.dumps(state))
        make_trainer("dm", folder, datasets, start=50, interval=interval, resume_from_checkpoint="latest").fit()
        return summary(folder)

    make_trainer("dm", tmp_path / "whole", datasets).fit()
    # Both turns run once more at least, so the account is whole again.
    assert counted(resume(tmp_path / "a", 5, 3)) == counted(summary(tmp_path / "whole"))
    # Here no student's turn is left.
    account = resume(tmp_path / "b", 5, 10)
    assert account["steps"] == STEPS and account["seconds"] > 0
    assert not {"flops", "passes", "images_seen"} & account.keys()


@pytest.mark.parametrize("case", ["teacher", "dm", "adm"])
def test_counting_changes_no_weight(case, tmp_path, datasets):
    make_trainer(case, tmp_path / "counted", datasets).fit()
    trainer = make_trainer(case, tmp_path / "plain", datasets)
    trainer.account.work = {turn.name: {} for turn in trainer.turns}
    trainer.fit()
    assert "flops" in summary(tmp_path / "counted") and "flops" not in summary(tmp_path / "plain")
    for folder in ("final", f"checkpoint-{STEPS}"):
        assert different(tmp_path / "counted" / folder, tmp_path / "plain" / folder) == []


def test_accumulation_costs_the_same(tmp_path, datasets):
    make_trainer("dm", tmp_path / "big", datasets, train_batch_size=4).fit()
    make_trainer("dm", tmp_path / "small", datasets, train_batch_size=1, gradient_accumulation_steps=4).fit()
    assert counted(summary(tmp_path / "small")) == counted(summary(tmp_path / "big"))


# ------------------------------------------------------------------ of pairs


def pairs_of(folder, num_pairs=10, **changes):
    settings = {"conditions": torch.arange(4), "image_shape": (1, 8, 8), "fingerprint": "f" * 64, "num_steps": 3}
    settings |= {"shard_size": 4, "batch_size": 3, "progress": False, **changes}
    return generate_pairs(denoiser_for(tiny_unet(), SCHEDULE), folder, num_pairs, **settings)


def test_pairs_cost_what_their_network_calls_do(tmp_path):
    """Heun of three steps: five calls. Ten pairs in shards of four, in batches of three and less."""
    pairs_of(tmp_path)
    account = pairs_account(tmp_path)
    assert account["pairs"] == 10 and account["passes"] == {"teacher": {"forward": 50}} and account["seconds"] > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # Without attention's own kernel, which torch does not count on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            denoiser_for(tiny_unet(), SCHEDULE)(torch.zeros(1, 1, 8, 8), 500, torch.tensor([0]))
    assert account["flops"] == 50 * counter.get_total_flops()


def test_pairs_of_interrupted_and_of_several_processes_cost_the_same_and_pairs_made_twice_more(tmp_path):
    pairs_of(tmp_path / "whole")
    for rank in (0, 1):
        pairs_of(tmp_path / "two", rank=rank, world_size=2)
    whole, two = (pairs_account(tmp_path / name) for name in ("whole", "two"))
    assert counted(two) == counted(whole)
    (tmp_path / "whole" / "pairs-00001.safetensors").unlink()
    pairs_of(tmp_path / "whole")
    again = pairs_account(tmp_path / "whole")
    assert again["pairs"] == 14 and again["flops"] * 10 == whole["flops"] * 14
    assert again["seconds"] > whole["seconds"]


def test_pairs_without_a_whole_account_have_none(tmp_path):
    pairs_of(tmp_path)
    (tmp_path / "pairs-00001.safetensors").unlink()
    (tmp_path / "account_0.json").unlink()
    assert pairs_account(tmp_path) == {}
    pairs_of(tmp_path)
    assert pairs_account(tmp_path) == {}
    with pytest.raises(FileNotFoundError, match="^pairs_dir: "):
        pairs_account(tmp_path / "nowhere")


# ------------------------------------------------------------------ sums


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def stage(flops, **changes) -> dict:
    account = {"steps": 5, "seconds": 2.0, "flops": flops, "passes": {"student": {"forward": flops}}}
    return {**account, "peak_memory": {"process_resident": flops}, "hardware": ["cpu"], "device": "cpu", **changes}


@pytest.fixture
def run(tmp_path):
    """Two students of two stages, which cost 1, 2, 10 and 20, and pairs of 300."""
    write(tmp_path / RUN_FILE, {"num_students": 2, "stages": ["dm", "adm"]})
    for k, factor in enumerate((1, 10)):
        write(tmp_path / f"student_{k}" / "dm" / "final" / "summary.json", stage(factor, images_seen={"pairs": 7}))
        adm = stage(2 * factor, images_seen={"images": 5}, hardware=["gpu"])
        write(tmp_path / f"student_{k}" / "adm" / "final" / "summary.json", adm)
    write(tmp_path / PAIRS_FILE, {"pairs": 4, "flops": 300, "passes": {"teacher": {"forward": 9}}, "seconds": 1.0})
    return tmp_path


def test_accounts_are_added_over_stages_students_and_pairs(run):
    record = training_record(run)
    assert (record["steps"], record["seconds"], record["flops"], record["flops_with_pairs"]) == (20, 8.0, 33, 333)
    assert record["passes"] == {"student": {"forward": 33}}
    assert record["images_seen"] == {"pairs": 14, "images": 10}
    assert record["peak_memory"] == {"process_resident": 20} and record["hardware"] == ["cpu", "gpu"]
    assert [record["students"][f"student_{k}"]["flops"] for k in (0, 1)] == [3, 30]
    assert record["pairs"]["pairs"] == 4
    json.dumps(record)


def test_without_pairs_the_sum_is_that_of_the_students(run):
    (run / PAIRS_FILE).unlink()
    record = training_record(run)
    assert record["flops_with_pairs"] == record["flops"] == 33 and "pairs" not in record


def test_runs_of_earlier_versions_are_read_and_no_sum_is_too_small(run, tmp_path):
    path = run / "student_1" / "dm" / "final" / "summary.json"
    path.write_text(json.dumps({"steps": 5, "global_batch_size": 4, "seconds": 2.0, "skipped": {}, "device": "cpu"}))
    record = training_record(run)
    assert record["steps"] == 20 and record["seconds"] == 8.0
    assert not {"flops", "passes", "flops_with_pairs", "hardware"} & record.keys()
    assert record["students"]["student_0"]["flops"] == 3
    # Pairs without account.
    write(path, stage(10, images_seen={}))
    write(run / PAIRS_FILE, {})
    assert training_record(run)["flops"] == 33 and "flops_with_pairs" not in training_record(run)
    assert training_record(tmp_path / "no_run") == {}


def test_the_sum_of_nothing_is_nothing():
    assert add_accounts([]) == {}


# ------------------------------------------------------------------ what came out


def test_storage_is_that_of_the_components_alone(tmp_path):
    pipe = tiny_pipeline(2)
    pipe.save_pretrained(tmp_path)
    before = storage_bytes(tmp_path)
    weights = sum(p.nbytes for unet in pipe.students.values() for p in unet.parameters())
    assert weights < before < 1.2 * weights
    write(tmp_path / "student_0" / "dm" / "checkpoint-5" / "student" / "config.json", {"a": "checkpoint"})
    write(tmp_path / "results" / "results.json", {"a": "report"})
    assert storage_bytes(tmp_path) == before
    save_teacher(tmp_path / "teacher", tiny_unet(), edm_scheduler())
    assert storage_bytes(tmp_path / "teacher") == pytest.approx(before / 2, rel=0.2)
    assert storage_bytes("owner/of-a-hub-repository") is None


def test_latency_is_of_several_calls_after_one_more():
    calls = []

    def call():
        calls.append(None)
        return torch.zeros(1)

    result = latency(call, 3)
    assert len(calls) == 4 and result.keys() == {"wall_ms", "processor_ms"} and result["wall_ms"] > 0


def test_the_cost_of_a_model_goes_into_the_table(run):
    tiny_pipeline(2).save_pretrained(run)
    sizes = []

    class Model:
        parameters, parameters_total = 1, 2

        def sample(self, z, labels):
            sizes.append((z.shape, labels.shape))
            return z

    cost = model_row("a", str(run), Model(), (1, 8, 8), torch.device("cpu"))
    assert set(sizes) == {((1, 1, 8, 8), (1,))}
    assert cost["training_seconds"] == 8.0 and cost["training"]["flops_with_pairs"] == 333
    assert cost["storage_bytes"] == storage_bytes(run) and "threads" in cost["latency"]["hardware"]
    cost["training"]["flops_with_pairs"] = 1_234_500_000_000_000
    cost["latency"]["wall_ms"] = 12.34
    rows = [{**cost, "fd": 1.5, "images_per_second": None}]
    header, _, row = markdown_table(rows).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | ")))
    assert cells["training TFLOP, with pairs"] == "1,234.50"
    assert float(cells["storage MB"]) == pytest.approx(cost["storage_bytes"] / 1e6, abs=0.01)
    assert cells["ms at batch 1 (wall) |"] == "12.3 |"

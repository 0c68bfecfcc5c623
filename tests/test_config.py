# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
import dataclasses
import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from diffusers_msd.config import for_stage, parse_config, run_script
from diffusers_msd.data import DataConfig
from diffusers_msd.stage_config import StageConfig
from diffusers_msd.students import StudentConfig
from diffusers_msd.training_config import TrainingConfig


SCRIPTS = Path(__file__).parents[1] / "training_scripts"
CONFIGURED = (
    "train_teacher.py",
    "generate_pairs.py",
    "train_msd.py",
    "evaluate.py",
    "make_reference.py",
    "prepare_emoji.py",
    "train_text_parts.py",
    "cache_captions.py",
    "train_text_teacher.py",
    "evaluate_text.py",
)
# The scripts that the configs are for, by the end of their names; what is required beside them.
TEACHER, FOLDERS = ["--pretrained_teacher_model", "x"], ["--captions_dir", "x", "--pretrained_base_model", "x"]
SCRIPT_OF = {
    "emoji_text_parts": ("train_text_parts.py", []),
    "emoji_teacher": ("train_text_teacher.py", FOLDERS),
    "emoji_teacher_gpu": ("train_text_teacher.py", FOLDERS),
    "digits_teacher": ("train_teacher.py", []),
    "fashion_mnist_teacher": ("train_teacher.py", []),
    "fashion_mnist_16_teacher": ("train_teacher.py", []),
}


@dataclass
class Example:
    """What the parser has to cope with."""

    output_dir: str = field(metadata={"help": "A setting without default."})
    sigma_data: float = field(default=0.5, metadata={"help": "A number."})
    student_index: int | None = field(default=None, metadata={"help": "A number or nothing."})
    resize: bool = field(default=False, metadata={"help": "A switch."})
    mixed_precision: str | None = field(default=None, metadata={"help": "no or bf16."})
    stages: list[str] = field(
        default_factory=lambda: ["dm"], metadata={"help": "Several.", "choices": ["tsm", "dm", "adm"]}
    )
    learning_rate: list[float] = field(default_factory=lambda: [1e-4], metadata={"help": "One per stage."})


def parse(*argv: str) -> Example:
    (config,) = parse_config([Example], "A description.", list(argv))
    return config


def write(folder: Path, text: str) -> str:
    path = folder / "example.yaml"
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------ YAML and flags


def test_a_yaml_file_means_the_same_as_flags(tmp_path):
    text = """
        sigma_data: 0.75
        student_index: 3
        resize: true
        mixed_precision: bf16
        stages: [tsm, adm]
        learning_rate: [1e-3, 2.5e-5]
    """
    from_file = parse("--config", write(tmp_path, text), "--output_dir", "runs/x")
    flags = (
        "--sigma_data 0.75 --student_index 3 --resize --mixed_precision bf16 --stages tsm adm "
        "--learning_rate 1e-3 2.5e-5 --output_dir runs/x"
    )
    assert from_file == parse(*flags.split())
    assert from_file.learning_rate == [1e-3, 2.5e-5] and from_file.resize is True


def test_flags_win_over_the_yaml_file(tmp_path):
    path = write(tmp_path, "sigma_data: 0.75\nstages: [tsm, dm, adm]\nresize: true\nlearning_rate: 1.0e-3\n")
    for argv in (["--config", path], ["--resize", "false"]):
        assert parse("--output_dir", "x", *argv).stages == (["tsm", "dm", "adm"] if path in argv else ["dm"])
    config = parse("--stages", "adm", "--output_dir", "x", "--config", path, "--resize", "false")
    assert config.stages == ["adm"] and config.resize is False
    assert config.sigma_data == 0.75 and config.learning_rate == [1e-3]


def test_required_setting_may_come_from_the_yaml_file(tmp_path):
    assert parse("--config", write(tmp_path, "output_dir: runs/x\n")).output_dir == "runs/x"
    with pytest.raises(ValueError, match="output_dir"):
        parse("--config", write(tmp_path, "sigma_data: 1\n"))


def test_yaml_no_is_the_word_no(tmp_path):
    """YAML 1.1 reads a plain no as False; as a flag it is the word."""
    assert parse("--config", write(tmp_path, "mixed_precision: no\n"), "--output_dir", "x").mixed_precision == "no"
    assert parse("--config", write(tmp_path, "resize: no\n"), "--output_dir", "x").resize is False


@pytest.mark.parametrize("value", ["null", "~", ""])
def test_yaml_null_is_none_where_that_is_the_default_and_else_refused(value, tmp_path):
    path = write(tmp_path, f"student_index: {value}\n")
    assert parse("--config", path, "--output_dir", "x").student_index is None
    with pytest.raises(ValueError, match="sigma_data"):
        parse("--config", write(tmp_path, f"sigma_data: {value}\n"), "--output_dir", "x")


def test_negative_numbers_are_values(tmp_path):
    assert parse("--output_dir", "x", "--sigma_data", "-1.2").sigma_data == -1.2
    assert parse("--output_dir", "x", "--config", write(tmp_path, "sigma_data: -1.2\n")).sigma_data == -1.2


# ------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("typo, meant", [("sigma_dat", "sigma_data"), ("learning-rat", "learning_rate")])
def test_typo_in_the_yaml_file_suggests_the_closest_name(typo, meant, tmp_path):
    path = write(tmp_path, f"{typo}: 1\n")
    with pytest.raises(ValueError, match=f"^config: {path}: unknown setting '{typo}', did you mean {meant}\\?$"):
        parse("--config", path, "--output_dir", "x")


@pytest.mark.parametrize("typo, meant", [
    (["--sigma_dat", "1"], "--sigma_data"),
    (["--stagess", "dm"], "--stages"),
    (["--learning_rates=1e-4"], "--learning_rate"),
    (["--stage", "tsm", "dm"], "--stages"),
])  # fmt: skip
def test_typo_on_the_command_line_suggests_the_closest_name(typo, meant):
    """Prefixes are typos too: --stage must not silently mean --stages."""
    with pytest.raises(ValueError, match=f"^{re.escape(typo[0])}: unknown argument, did you mean {meant}\\?$"):
        parse("--output_dir", "x", *typo)


def test_name_that_resembles_nothing_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="unknown setting 'zzz'; known are learning_rate, .*stages"):
        parse("--config", write(tmp_path, "zzz: 1\n"), "--output_dir", "x")


@pytest.mark.parametrize("argv, name", [
    (["--sigma_data", "much"], "sigma_data"),
    (["--student_index", "1.5"], "student_index"),
    (["--stages", "tsm", "gan"], "stages"),
    (["--stages"], "stages"),
    (["--resize", "perhaps"], "resize"),
    (["--sigma_data", "1", "2"], "2"),
])  # fmt: skip
def test_value_of_a_wrong_kind_is_an_error_that_names_the_flag(argv, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        parse("--output_dir", "x", *argv)


def test_value_of_a_wrong_kind_in_the_yaml_file_is_an_error_too(tmp_path):
    with pytest.raises(ValueError, match="sigma_data"):
        parse("--config", write(tmp_path, "sigma_data: much\n"), "--output_dir", "x")


def test_missing_required_setting_is_named():
    with pytest.raises(ValueError, match="output_dir"):
        parse("--sigma_data", "1")


def test_unusable_config_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: .*nowhere.yaml"):
        parse("--config", str(tmp_path / "nowhere.yaml"), "--output_dir", "x")
    with pytest.raises(ValueError, match="config: .*not valid YAML"):
        parse("--config", write(tmp_path, "a: [1\n"), "--output_dir", "x")
    with pytest.raises(ValueError, match="config: .*got a list"):
        parse("--config", write(tmp_path, "- 1\n"), "--output_dir", "x")


def test_empty_config_file_changes_nothing(tmp_path):
    assert parse("--config", write(tmp_path, "# nothing\n"), "--output_dir", "x") == parse("--output_dir", "x")


# ------------------------------------------------------------------ one value per stage


def test_lists_of_one_value_per_stage_are_cut_to_the_stage():
    config = TrainingConfig(max_train_steps=[10, 20, 30], learning_rate=[1e-3])
    cut = [for_stage(config, i, 3) for i in range(3)]
    assert [c.max_train_steps for c in cut] == [[10], [20], [30]]
    assert [c.learning_rate for c in cut] == [[1e-3]] * 3
    assert config.max_train_steps == [10, 20, 30] and cut[0].seed == config.seed
    assert for_stage(StageConfig(student_update_interval=[1, 5]), 1, 2).student_update_interval == [5]


def test_list_with_another_number_of_values_than_stages_is_an_error():
    with pytest.raises(ValueError, match=r"max_train_steps: 1 value or 3 \(one per stage\) expected, got \[10, 20\]"):
        for_stage(TrainingConfig(max_train_steps=[10, 20]), 0, 3)


# ------------------------------------------------------------------ scripts


def test_script_reports_bad_input_in_one_line_with_status_2(capsys):
    def main():
        raise ValueError("num_students: 1 to 10 expected, got 11\nsecond line of a library's message")

    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: num_students: 1 to 10 expected, got 11") and error.count("\n") == 1


def test_traceback_is_shown_on_request(monkeypatch):
    def main():
        raise ValueError("bad")

    monkeypatch.setenv("DIFFUSERS_MSD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"):
        run_script(main)


def test_interrupted_script_has_status_130(capsys):
    def main():
        raise KeyboardInterrupt("student_0/dm: interrupted at step 3; continue with --resume_from_checkpoint latest")

    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == 130
    assert "continue with --resume_from_checkpoint latest" in capsys.readouterr().err


def test_a_bug_is_not_hidden_behind_status_2():
    def main():
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        run_script(main)


def dataclasses_of(script: str) -> list[type]:
    """Those of the script itself and those it imports from the package."""
    found = runpy.run_path(str(SCRIPTS / script)).values()
    classes = [value for value in found if isinstance(value, type) and dataclasses.is_dataclass(value)]
    # CLIPTextConfig and its like are dataclasses too, but not ours.
    return [c for c in classes if c.__name__.endswith("Config") and not c.__module__.startswith("transformers")]


@pytest.mark.parametrize("script", CONFIGURED)
def test_help_explains_every_flag(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert exit.value.code == 0
    # argparse wraps lines, also at hyphens.
    shown = "".join(capsys.readouterr().out.split())
    fields = [field for cls in dataclasses_of(script) for field in dataclasses.fields(cls)]
    assert len(fields) >= 3
    for each in fields:
        text = each.metadata["help"]
        assert len(text) > 10 and text.endswith("."), f"{each.name}: {text!r}"
        assert f"--{each.name}" in shown and "".join(text.split()) in shown, each.name
    assert "--config" in shown


def test_no_two_concerns_share_a_flag():
    for script in CONFIGURED:
        names = [field.name for cls in dataclasses_of(script) for field in dataclasses.fields(cls)]
        assert len(names) == len(set(names)), script


def test_shipped_configs_hold_known_settings():
    assert {DataConfig, TrainingConfig} <= set(dataclasses_of("train_teacher.py"))
    assert {DataConfig, TrainingConfig, StageConfig, StudentConfig} <= set(dataclasses_of("train_msd.py"))
    paths = sorted((SCRIPTS / "configs").glob("*.yaml"))
    assert set(SCRIPT_OF) < {path.stem for path in paths}
    for path in paths:
        script, required = SCRIPT_OF.get(path.stem, ("train_msd.py", TEACHER))
        parse_config(dataclasses_of(script), "", ["--config", str(path), "--output_dir", "x", *required])

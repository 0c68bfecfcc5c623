# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""How far students are that other processes train: read from their logs, shown as bars."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm


@dataclass(frozen=True)
class Progress:
    """How far a student is.

    Args:
        position: iterations that are logged, of all stages together.
        shown: what is said of it: the stage, the newest losses and distance.
    """

    position: int
    shown: dict[str, str]


def progress_of(folder: Path, stages: list[str], steps: list[int]) -> Progress:
    """Reads the logs of a student.

    Args:
        folder: `student_k` of a run.
        stages: of the run.
        steps: iterations of each.
    """
    position, shown = 0, {"stage": "-"}
    for stage, total in zip(stages, steps):
        log = folder / stage / "log.jsonl"
        if not log.is_file():
            break
        # The last line may be half written.
        lines = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        newest = {name: value for line in lines for name, value in line.items()}
        shown = {"stage": stage}
        for name, key in (("loss", "student/loss"), ("fd", "validation/fd")):
            if key in newest:
                shown[name] = f"{newest[key]:.3g}"
        if not (folder / stage / "final" / "summary.json").is_file():
            return Progress(position + newest.get("step", 0), shown)
        position += total
    return Progress(position, shown)


def show_end(log: Path, lines: int = 15):
    """Prints the end of a log to stderr, without what progress bars have overwritten."""
    # As bytes: as text, the "\r" of bars would count as ends of lines.
    text = log.read_bytes().decode(errors="replace").rstrip() if log.is_file() else ""
    last = [line.rpartition("\r")[2] for line in text.split("\n")[-lines:]]
    print(f"--- the end of {log}", *last, "---", sep="\n", file=sys.stderr)


def _as_text(shown: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in shown.items())


class View:
    """A progress bar for each student of a run: iterations with the time left, stage, loss, distance, restarts, and
    for how many minutes nothing new was logged.

    Args:
        output_dir: of the run.
        stages: of the run.
        steps: iterations of each stage.
        num_students: K.
    """

    def __init__(self, output_dir: Path, stages: list[str], steps: list[int], num_students: int):
        self.students = range(num_students)
        self.restarts = dict.fromkeys(self.students, 0)
        self.output_dir, self.stages, self.steps = output_dir, stages, steps
        self.newest, self.bars = {}, []
        for k in self.students:
            self.newest[k] = (self._progress(k), time.monotonic())
            self.bars.append(
                tqdm(
                    desc=f"student {k}",
                    total=sum(steps),
                    initial=self.newest[k][0].position,
                    unit="it",
                    position=k,
                    dynamic_ncols=True,
                )
            )

    def _progress(self, k: int) -> Progress:
        return progress_of(self.output_dir / f"student_{k}", self.stages, self.steps)

    def update(self):
        """Draws what is new."""
        for k, bar in enumerate(self.bars):
            progress, since = self._progress(k), time.monotonic()
            if self.newest[k][0] == progress:
                since = self.newest[k][1]
            self.newest[k] = progress, since
            quiet = int(time.monotonic() - since) // 60
            shown = {**progress.shown, "restarts": self.restarts[k], **({"quiet": f"{quiet} min"} if quiet else {})}
            if (bar.n, bar.postfix) != (progress.position, _as_text(shown)):
                bar.n = progress.position
                bar.set_postfix_str(_as_text(shown))

    def say(self, line: str):
        """A line above the bars."""
        tqdm.write(line, file=sys.stderr)

    def close(self):
        self.update()
        for bar in self.bars:
            bar.close()

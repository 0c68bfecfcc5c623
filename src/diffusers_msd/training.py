# Copyright 2026 The diffusers_msd authors.
# SPDX-License-Identifier: Apache-2.0
"""One accelerate loop for every stage. It knows turns, batches and optimizers; the method is in `stages`."""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .account import StageAccount
from .batches import load_batches
from .checkpoint import (
    STATE_FILE,
    discard_after,
    find_checkpoint,
    load_optimizer,
    load_weights,
    prune,
    read_state,
    save_optimizer,
    save_weights,
)
from .draws import Draws, derive_seed
from .files import atomic_directory, atomic_write, write_json
from .stages import Turn
from .training_config import TrainingConfig


class _Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step is finished and saved before leaving."""

    def __enter__(self):
        self.received = False
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *exception):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


class Trainer:
    """Trains the turns of one stage and leaves `final/` in `output_dir`, with checkpoints and `log.jsonl` beside it.

    Args:
        accelerator: from `create_accelerator`.
        turns: the stage, see `stages`; EMA is kept of the first turn's first model.
        datasets: by the names turns need; their `__getitems__(indices)` gives a dict of tensors.
        config: `max_train_steps` and `learning_rate` are the first of their lists.
        output_dir: of this stage.
        name: of the run in logs, and part of every seed, such as "student_0/dm".
        validate: called as validate(step, model) with the averaged weights; may return numbers to log.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        turns: list[Turn],
        datasets: dict[str, Dataset],
        config: TrainingConfig,
        output_dir: Path,
        name: str,
        validate: Callable[[int, ModelMixin], dict[str, float]] | None = None,
    ):
        self.accelerator = accelerator
        self.turns = turns
        self.datasets = datasets
        self.config = config
        self.output_dir = Path(output_dir)
        self.name = name
        self.validate = validate
        self.max_steps = config.max_train_steps[0]
        self.total = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.step = 0
        self.seconds = 0.0
        self.window: dict[str, list[float]] = {}
        self.skipped = {turn.name: {"total": 0, "in_a_row": 0} for turn in turns}
        self.account = StageAccount(accelerator, self.total)
        self._prepare()

    def _prepare(self):
        device = self.accelerator.device
        self.wrapped, self.optimizers, self.schedules = {}, {}, {}
        for turn in self.turns:
            turn.claim()
            for module in turn.frozen.values():
                module.to(device)
            for model in turn.models().values():
                if self.config.gradient_checkpointing and model._supports_gradient_checkpointing:
                    model.enable_gradient_checkpointing()
            self.wrapped[turn.name] = self.accelerator.prepare_model(turn)
            optimizer = self._optimizer([p for p in turn.parameters() if p.requires_grad])
            self.optimizers[turn.name] = optimizer
            self.schedules[turn.name] = get_scheduler(
                self.config.lr_scheduler,
                optimizer,
                num_warmup_steps=self.config.lr_warmup_steps,
                num_training_steps=self.max_steps,
            )
        self.main_name, self.main_model = next(iter(self.turns[0].models().items()))
        self.turns[0].claim()
        self.main_parameters = [p for p in self.main_model.parameters() if p.requires_grad]
        self.ema = None
        if self.config.ema_decay > 0:
            self.ema = EMAModel(self.main_parameters, decay=self.config.ema_decay, foreach=True)

    def _optimizer(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        settings = {
            "lr": c.learning_rate[0],
            "betas": (c.adam_beta1, c.adam_beta2),
            "weight_decay": c.adam_weight_decay,
            "eps": c.adam_epsilon,
        }
        if not c.use_8bit_adam:
            return torch.optim.AdamW(parameters, **settings, fused=True)
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError("use_8bit_adam: needs bitsandbytes: pip install bitsandbytes") from error
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)

    # ------------------------------------------------------------------ the loop

    def fit(self) -> Path:
        """Trains to `max_train_steps`, from the checkpoint to resume from if there is one.

        Returns:
            The folder `final/`, which holds each network's weights (averaged ones for the first) and `summary.json`,
            with the stage's `account`. Seconds, passes and arithmetic are of its turns, without validation and files.

        Raises:
            FloatingPointError: after `max_nonfinite_steps` updates in a row with a NaN or infinite loss or gradient.
            KeyboardInterrupt: on SIGINT or SIGTERM, after writing a checkpoint.
            FileNotFoundError, ValueError: if the checkpoint to resume from is missing, damaged or of another run.
        """
        self._resume()
        bar = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc=self.name,
            unit="it",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )
        with bar, _Interrupt() as interrupt:
            # Data workers are forked in here: they get a Ctrl-C too, and must live until the step is finished.
            batches = {t.name: {need: self._batches(t, need) for need in t.needs} for t in self.turns}
            while self.step < self.max_steps:
                began = time.perf_counter()
                # Dropout and whatever else uses the global generator follow the step too.
                torch.manual_seed(derive_seed(self.config.seed, self.name, self.step, self.accelerator.process_index))
                for turn in self.turns:
                    if turn.runs_before(self.step + 1) > turn.runs_before(self.step):
                        self._run_turn(turn, batches[turn.name])
                for schedule in self.schedules.values():
                    schedule.step()
                self.step += 1
                self.seconds += time.perf_counter() - began
                bar.update()
                self._after_step(bar, self._any_rank(interrupt.received))
            final = self._save_final()
            if self._any_rank(interrupt.received):
                raise KeyboardInterrupt(f"{self.name}: interrupted after its last step; run again to go on")
        return final

    def _run_turn(self, turn: Turn, batches: dict[str, Iterator]):
        turn.claim()
        wrapped, optimizer = self.wrapped[turn.name], self.optimizers[turn.name]
        micro_steps = self.config.gradient_accumulation_steps
        keys = (self.config.seed, self.name, turn.name, self.step)
        sums: dict[str, torch.Tensor] = {}
        with self.account.run_of(turn.name, turn.networks, turn.needs):
            for micro, rows in enumerate(self._rows()):
                batch = {need: self._to_device(next(iterator)) for need, iterator in batches.items()}
                last = micro == micro_steps - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):
                    losses = wrapped(batch, Draws(keys, self.total, rows, self.accelerator.device))
                    self.accelerator.backward(losses["loss"].mean() / micro_steps)
                for key, value in losses.items():
                    sums[key] = sums.get(key, 0) + value.detach().mean() / micro_steps
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        # The only synchronisation of a turn: all its numbers at once, averaged over the processes.
        values = self.accelerator.reduce(torch.stack([v.double() for v in sums.values()]), reduction="mean").tolist()
        self._update(turn, optimizer, dict(zip(sums, values)))

    def _update(self, turn: Turn, optimizer: torch.optim.Optimizer, values: dict[str, float]):
        skipped = self.skipped[turn.name]
        if all(math.isfinite(v) for v in values.values()):
            skipped["in_a_row"] = 0
            optimizer.step()
            if self.ema is not None and turn is self.turns[0]:
                self.ema.step(self.main_parameters)
            for key, value in values.items():
                self.window.setdefault(f"{turn.name}/{key}", []).append(value)
        else:
            skipped["total"] += 1
            skipped["in_a_row"] += 1
            bad = ", ".join(key for key, v in values.items() if not math.isfinite(v))
            tqdm.write(f"{self.name}: step {self.step}: {turn.name} update skipped, not finite: {bad}")
        optimizer.zero_grad(set_to_none=True)
        if skipped["in_a_row"] >= self.config.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.name}: {turn.name}: NaN or infinite loss or gradient {skipped['in_a_row']} times in a row, "
                f"up to step {self.step}; stopped, the last checkpoint in {self.output_dir} is untouched. Try a lower "
                "--learning_rate, a longer --lr_warmup_steps or --mixed_precision no"
            )

    def _rows(self) -> Iterator[slice]:
        """This process's rows of the global batch, one slice per accumulation step."""
        size, world = self.config.train_batch_size, self.accelerator.num_processes
        for micro in range(self.config.gradient_accumulation_steps):
            start = (micro * world + self.accelerator.process_index) * size
            yield slice(start, start + size)

    def _batches(self, turn: Turn, need: str) -> Iterator[dict[str, torch.Tensor]]:
        positions = range(turn.runs_before(self.step), turn.runs_before(self.max_steps))
        rows = list(self._rows())
        keys = (self.config.seed, self.name, turn.name, need)
        return load_batches(self.datasets[need], positions, self.total, rows, keys, self.config.dataloader_num_workers)

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    def _any_rank(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, reduction="sum") > 0)

    # ------------------------------------------------------------------ what happens between steps

    def _after_step(self, bar: tqdm, interrupted: bool):
        config, done = self.config, self.step == self.max_steps
        if self.step % config.logging_steps == 0 or done:
            self._log(bar)
        # Before the checkpoint: a run resumed from it has this step's numbers in its log.
        if done or (config.validation_steps and self.step % config.validation_steps == 0):
            self._validate()
        # Weights that give NaN may be what is broken: they do not push out the last good checkpoint.
        good = all(counts["in_a_row"] == 0 for counts in self.skipped.values())
        if interrupted or done or (self.step % config.checkpointing_steps == 0 and good):
            self._save_checkpoint()
        if interrupted and not done:
            raise KeyboardInterrupt(
                f"{self.name}: interrupted at step {self.step}; continue with --resume_from_checkpoint latest"
            )

    def _log(self, bar: tqdm):
        values = {key: sum(v) / len(v) for key, v in self.window.items()}
        self.window = {}
        values["lr"] = self.schedules[self.turns[0].name].get_last_lr()[0]
        values["skipped"] = sum(s["total"] for s in self.skipped.values())
        self._record({**values, "seconds": self.seconds})
        bar.set_postfix({k: f"{v:.3g}" for k, v in values.items() if k.endswith("loss")})

    def _record(self, values: dict[str, float]):
        """Appends a line to `log.jsonl` and hands the numbers to the tracker."""
        if self.accelerator.is_main_process:
            with (self.output_dir / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log({f"{self.name}/{key}": value for key, value in values.items()}, step=self.step)

    @contextlib.contextmanager
    def _averaged(self):
        """The first model with its averaged weights inside the block."""
        if self.ema is None:
            yield self.main_model
            return
        own = [p.detach().clone() for p in self.main_parameters]
        self.ema.copy_to(self.main_parameters)
        try:
            yield self.main_model
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.main_parameters, own)

    def _validate(self):
        if self.validate is not None and self.accelerator.is_main_process:
            with self._averaged() as model, torch.no_grad():
                values = self.validate(self.step, model)
            if values:
                self._record({f"validation/{key}": value for key, value in values.items()})
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ files

    def _settings(self) -> dict:
        """What a resumed run must share with the saved one for its numbers to mean the same."""
        return {
            "name": self.name,
            "seed": self.config.seed,
            "global_batch_size": self.total,
            "ema": self.ema is not None,
        }

    def _save_checkpoint(self):
        account = self.account.state()
        if self.accelerator.is_main_process:
            with atomic_directory(self.output_dir / f"checkpoint-{self.step}") as folder:
                for turn in self.turns:
                    for name, model in turn.models().items():
                        save_weights(model, folder / name)
                    save_optimizer(self.optimizers[turn.name], folder / f"optimizer_{turn.name}.safetensors")
                if self.ema is not None:
                    with self._averaged() as model:
                        save_weights(model, folder / f"{self.main_name}_ema")
                state = {
                    "step": self.step,
                    "seconds": self.seconds,
                    "window": self.window,
                    "skipped": self.skipped,
                    "account": account,
                    "ema_step": self.ema.optimization_step if self.ema is not None else 0,
                    "schedules": {name: s.state_dict() for name, s in self.schedules.items()},
                    "settings": self._settings(),
                }
                write_json(folder / STATE_FILE, state)
            prune(self.output_dir, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self):
        checkpoint = find_checkpoint(self.output_dir, self.config.resume_from_checkpoint)
        if self.config.resume_from_checkpoint is None and find_checkpoint(self.output_dir, "latest") is not None:
            raise ValueError(
                f"output_dir: {self.output_dir} holds checkpoints of an earlier run; continue it with "
                "--resume_from_checkpoint latest, or use another folder"
            )
        log = self.output_dir / "log.jsonl"
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            lines = log.read_text().splitlines(keepends=True) if log.exists() and checkpoint is not None else []
            # A crash may have cut the last line short.
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            discard_after(self.output_dir, self.step)
            atomic_write(log, "".join(kept))
        self.accelerator.wait_for_everyone()

    def _load_checkpoint(self, checkpoint: Path):
        state = read_state(checkpoint)
        for key, now in self._settings().items():
            if state["settings"][key] != now:
                raise ValueError(
                    f"resume_from_checkpoint: {checkpoint} was made with {key} = {state['settings'][key]}, "
                    f"now it is {now}"
                )
        for turn in self.turns:
            for name, model in turn.models().items():
                load_weights(model, checkpoint / name)
            load_optimizer(self.optimizers[turn.name], checkpoint / f"optimizer_{turn.name}.safetensors")
            self.schedules[turn.name].load_state_dict(state["schedules"][turn.name])
        if self.ema is not None:
            parameters = [p.detach() for p in self.main_parameters]
            own = [p.clone() for p in parameters]
            load_weights(self.main_model, checkpoint / f"{self.main_name}_ema")
            torch._foreach_copy_(self.ema.shadow_params, parameters)
            torch._foreach_copy_(parameters, own)
            self.ema.optimization_step = state["ema_step"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.window, self.skipped = state["window"], state["skipped"]
        if "account" in state:  # There was none in checkpoints of earlier versions.
            self.account.go_on_from(state["account"])

    def _save_final(self) -> Path:
        final = self.output_dir / "final"
        account = self.account.total({turn.name: turn.runs_before(self.step) for turn in self.turns})
        if self.accelerator.is_main_process:
            with atomic_directory(final) as folder:
                for turn in self.turns:
                    for name, model in turn.models().items():
                        with self._averaged() if name == self.main_name else contextlib.nullcontext():
                            save_weights(model, folder / name)
                write_json(
                    folder / "summary.json",
                    {
                        "steps": self.step,
                        "global_batch_size": self.total,
                        "seconds": self.seconds,
                        "skipped": self.skipped,
                        "device": str(self.accelerator.device),
                        **account,
                    },
                )
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        return final

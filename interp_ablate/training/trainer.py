"""Trainers of TRL that keep off the network and go on after a kill.

Knows: trainers, their checkpoints, and the loss on answers alone. Does not know: what a model is trained for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from interp_ablate.errors import RunError
from interp_ablate.jobs.bars import bar, quiet_libraries
from interp_ablate.models.batches import telling_of_memory
from interp_ablate.storage.incoming_files import incoming_object
from interp_ablate.storage.jsonl_log import JsonlLog
from interp_ablate.training.lora_targets import (
    Where,
    adapted_layers,
    in_words,
    lora_config,
    lora_targets,
)
from interp_ablate.training.recipe import LoraRecipe
from interp_ablate.training.rows import TrainingRow
from interp_ablate.training.trainable_model import TrainableModel, require_extra

logger = logging.getLogger(__name__)

JOURNAL_FORMAT = "interp_ablate.training/1"
_STATE = "trainer_state.json"  # what the trainer writes last of a checkpoint


def without_telemetry(kind: type) -> Any:
    """A TRL trainer that sends no telemetry, writes no card, and takes rows that are tokens already."""

    class Quiet(kind):  # type: ignore[misc, valid-type]
        def _send_telemetry(self) -> None:
            """Say nothing; TRL would tell the hub about every trainer that is made."""

        def create_model_card(self, *args: Any, **options: Any) -> None:
            """Write no card of TRL's beside every checkpoint."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset

    return Quiet


def common_arguments(base: TrainableModel, recipe: LoraRecipe, work: Path) -> dict[str, Any]:
    """The settings that SFTConfig and DPOConfig share; checkpoints go to `work`, reports nowhere."""
    on_cpu = base.device.type == "cpu"
    return {
        "output_dir": str(work),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, recipe.steps // 10),
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "max_length": None,  # rows are cut already, and counted
        "seed": recipe.seed,
        "bf16": base.dtype == torch.bfloat16 and not on_cpu,
        "fp16": False,
        "use_cpu": on_cpu,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "router_aux_loss_coef": 0.0,  # routers are not trained: the loss is that of the rows alone
        "disable_tqdm": True,
        "push_to_hub": False,
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": 1,
    }


@contextmanager
def checkpoint_folder(out: str | Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `out` for checkpoints: kept when the training is killed, removed when done.

    Checkpoints without a journal are removed first: nothing says which training they belong to.

    Raises:
        RunError: it holds the checkpoints of another training, is in use, or cannot be written.
    """
    work = Path(out).parent / f".{Path(out).name}.training"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def has_checkpoints() -> (
        bool
    ):  # where there are none nothing was done, and any training may begin
        return next(work.glob("**/checkpoint-*"), None) is not None

    journal = JsonlLog(
        work / "journal.jsonl",
        {"training": digest},
        kind="training journal",
        format=JOURNAL_FORMAT,
        lost="the training starts over",
        replace=not has_checkpoints(),
    )
    with journal.open() as lines:
        if not lines:
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            journal.append({"begun": True})
        try:
            yield work
        except BaseException:
            if not has_checkpoints():
                shutil.rmtree(work, ignore_errors=True)
            raise
    try:
        shutil.rmtree(work)
    except OSError as error:
        logger.warning("%s is not needed any more, and could not be removed: %s", work, error)


def _last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint; one that was being written when the process died is removed."""
    checkpoints = work.glob("checkpoint-*")
    for path in sorted(checkpoints, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            incoming_object(path / _STATE)
        except RunError:
            shutil.rmtree(path)
            continue
        return str(path)
    return None


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without the libraries' warnings about each other's deprecated names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Inside the block accelerate, which trainers hand their rows to, takes this device and not the first one."""
    name = "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(name)
    os.environ[name] = str(device)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def make_trainer(
    kind: type,
    config: type,
    base: TrainableModel,
    recipe: LoraRecipe,
    *,
    where: Where = "all",
    settings: Mapping[str, Any],
    **options: Any,
) -> Any:
    """A trainer of TRL's of some kind, made quiet, with a fresh adapter over a base.

    `config` is its settings' class. Embeddings that pad have the tokenizer's padding token, or its end of sequence.

    Raises:
        ExportError: see `lora_targets`.
        RunError: PEFT refuses the adapter, or puts it on other weights than those that were chosen.
    """
    if base.tokenizer.pad_token is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    targets = lora_targets(base.hf, where)
    peft_config = lora_config(base.hf, recipe, targets)
    with _no_advice(), _on_device(base.device):
        arguments = config(**settings)
        if base.device.type != "cpu":
            # else the first GPU of all, and a replica of the model on every other one
            vars(arguments).update(_setup_devices=base.device, _n_gpu=1)
        common = {"args": arguments, "processing_class": base.tokenizer, "peft_config": peft_config}
        try:
            trainer = kind(model=base.hf, **common, **options)
        except ValueError as error:
            raise RunError(f"no adapter can be put on this model: {error}") from error
    adapted = set(adapted_layers(trainer.model))
    if other := adapted.symmetric_difference(targets.weights):
        raise RunError(
            f"PEFT does not adapt what was chosen: {len(other)} weights differ, such as {min(other)}. "
            "This is a fault of this package; nothing was trained"
        )
    gone = f"; PEFT does not take {in_words(targets.left_out)}" if targets.left_out else ""
    logger.info("the LoRA adapts %s%s", in_words(targets.weights), gone)
    return trainer


def train(
    trainer: Any, work: Path, *, on_step: Callable[[int], None] | None = None
) -> list[dict[str, float]]:
    """Run a trainer, from its last checkpoint if there is one; returns what it logged, a dict a step.

    Raises:
        RunError: the loss is not finite; TRL does not know how this model computes its loss.
        ModelError: memory ran out.
    """
    from transformers import PrinterCallback, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            advance(1)
            if on_step:
                on_step(state.global_step)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps)
    # without a name PEFT does not ask the hub whether the vocabulary was resized
    trainer.model.peft_config["default"].base_model_name_or_path = ""
    try:
        with (
            telling_of_memory("in training"),
            _no_advice(),
            quiet_libraries(),
            bar("training steps", trainer.args.max_steps) as advance,
        ):
            trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    except (AttributeError, TypeError, NotImplementedError) as error:
        kind = trainer.model.config.model_type
        raise RunError(f"TRL cannot train a {kind} model this way: {error}") from error
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    wrong = [entry["step"] for entry in logged if not math.isfinite(entry["loss"])]
    if wrong:
        raise RunError(
            f"the loss is not finite from step {wrong[0]} of {len(logged)}: try a smaller "
            "--learning-rate, or --dtype float32"
        )
    return logged


def sft(
    base: TrainableModel,
    rows: Sequence[TrainingRow],
    recipe: LoraRecipe,
    work: Path,
    *,
    where: Where = "all",
) -> Any:
    """TRL's SFTTrainer over rows, with a fresh adapter on all linear layers and experts; the loss on answers alone.

    Raises:
        RunError: no rows; TRL or PEFT is missing.
    """
    from datasets import Dataset

    _, trl = require_extra()
    if not rows:
        raise RunError("there is no row to train on")
    data = Dataset.from_dict(
        {
            "input_ids": [[*row.prompt, *row.answer] for row in rows],
            "labels": [[-100] * len(row.prompt) + list(row.answer) for row in rows],
        }
    )
    return make_trainer(
        without_telemetry(trl.SFTTrainer),
        trl.SFTConfig,
        base,
        recipe,
        where=where,
        settings=common_arguments(base, recipe, work),
        train_dataset=data,
    )

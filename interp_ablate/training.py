"""Training: what fine-tuning with TRL and PEFT needs, whatever it is for.

Knows: LoRA over a decoder's linear layers (all of them, or those that do not write to the residual
stream), rows with the loss on the answer alone, trainers that keep off the network and go on after a
kill, merging, and the proof that what is written computes what was trained.
Does not know: why anyone trains (`preventing`, `healing`), plans, personas, files of data.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp_ablate.architectures import architecture_of
from interp_ablate.errors import ExportError, PromptError, RunError
from interp_ablate.export.card import CERTIFICATE, MANIFEST, versions
from interp_ablate.export.checkpoint import export_checkpoint, write_json
from interp_ablate.export.verify import LIMITS, PROBES
from interp_ablate.lines import Lines
from interp_ablate.model import Model, from_hf
from interp_ablate.prompts import Prompt
from interp_ablate.rendering import encode
from interp_ablate.scores import kl_divergence
from interp_ablate.selection import bootstrap_interval
from interp_ablate.sources import (
    ModelSource,
    check_device,
    load_hf,
    resolve,
    torch_dtype,
    weights_fingerprint,
)

log = logging.getLogger(__name__)

Where = Literal["all", "readers"]
INSTALL = "pip install 'interp-ablate[train]'"
ADAPTER = "adapter"  # the folder of a training's adapter, in its output
JOURNAL_FORMAT = "interp_ablate.training/1"
PACKAGES = ("trl", "peft", "datasets", "accelerate")
_STATE = "trainer_state.json"  # what the trainer writes last of a checkpoint


# ---- what is trained, and how ---------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run.

    Rank 32, alpha 64 and rank-stabilized scaling are those of Chen et al. 2025
    (https://arxiv.org/abs/2507.21509), who train an epoch of some thousand samples at a learning rate of
    1e-5; the default rate is for the few steps that show an effect on a small model.

    Args:
        steps: optimizer steps; a step sees `batch_size` rows.
        rslora: the adapter's output is scaled by alpha / sqrt(rank), not alpha / rank (Kalajdzievski
            2023, https://arxiv.org/abs/2312.03732).
        max_length: tokens of a row; a longer answer is cut, a prompt that leaves no room is left out.
        save_every: steps between checkpoints from which a killed run goes on.

    Raises:
        RunError: a number that cannot be.
    """

    steps: int = 60
    batch_size: int = 4
    learning_rate: float = 1e-4
    rank: int = 32
    alpha: int = 64
    rslora: bool = True
    max_length: int = 512
    seed: int = 0
    save_every: int = 20
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "alpha", "save_every"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)}: it is at least 1")
        if not (0 < self.learning_rate < 1):
            raise RunError(f"learning_rate={self.learning_rate}: accepted is above 0 and below 1")
        if self.max_length < 2:
            raise RunError(f"max_length={self.max_length}: a row has a prompt and an answer")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


RECIPE = Recipe()


@dataclass(frozen=True, eq=False)
class Base:
    """What is trained: a Hugging Face model in memory, its tokenizer and where it came from."""

    hf: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    source: ModelSource
    template: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @property
    def fingerprint(self) -> str:
        """sha256 over every weight's name, shape, dtype and bytes; computed anew each time."""
        return weights_fingerprint(self.hf.state_dict())

    @cached_property
    def model(self) -> Model:
        """The same weights with hook points, in place: what has been measured so is not trained any more."""
        return from_hf(self.hf, self.tokenizer, source=self.source, template=self.template)

    def copy(self) -> Base:
        """Weights of its own, to be trained while these stay as they are."""
        return replace(self, hf=copy.deepcopy(self.hf))


def load_base(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    template: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """A model to train, on one device.

    Raises:
        ModelError: as `load_model`.
        RunError: device "auto": layers over several GPUs are not trained here.
    """
    if device == "auto":
        raise RunError(
            "training runs on one device: give --device cpu or cuda. For several GPUs run the "
            "axolotl.yaml that `interp-ablate heal` writes"
        )
    source, place = resolve(name), check_device(device)
    hf, tokenizer = load_hf(
        source, dtype=torch_dtype(dtype), device=place, trust_remote_code=trust_remote_code
    )
    return Base(hf, tokenizer, source, template)


def require_extra() -> tuple[Any, Any]:
    """The packages `peft` and `trl`.

    Raises:
        RunError: one of them is missing; how to install it.
    """
    # their version checks and first imports ask the hub for nothing, their trainers would
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import peft
        import trl
    except ImportError as error:
        raise RunError(f"training needs TRL and PEFT ({error}): {INSTALL}") from error
    return peft, trl


def linear_modules(hf: Any) -> list[str]:
    """Names of the linear layers of a decoder, its unembedding left out."""
    from transformers.pytorch_utils import Conv1D

    head = hf.get_output_embeddings()
    kinds = (nn.Linear, Conv1D)
    return [
        name for name, part in hf.named_modules() if isinstance(part, kinds) and part is not head
    ]


def writing_modules(hf: Any) -> set[str]:
    """Names of the modules that write to the residual stream, embeddings included.

    Raises:
        ExportError: an architecture without an entry.
    """
    entry, names = architecture_of(hf.config), set(hf.state_dict())
    sites = entry.writer_sites(hf.config.num_hidden_layers)
    tensors = [name for site in sites for name in entry.writers(site, names, hf.config)]
    return {name.rpartition(".")[0] for name in tensors}


def lora_targets(hf: Any, where: Where = "all") -> list[str]:
    """Which modules an adapter is put on: "all" linear ones, or the "readers" of the stream only.

    Readers are what does not write to the stream itself (queries, keys, values, gate and up
    projections): with them, every weight that an ablation edited stays as it is, bit for bit.
    Short names (`q_proj`) where they mean just those modules, full names otherwise.

    Raises:
        ExportError: readers of an architecture without an entry; no linear layer to train.
    """
    if where not in get_args(Where):
        raise RunError(f"where={where!r}: accepted are {', '.join(get_args(Where))}")
    linear = linear_modules(hf)
    writers = writing_modules(hf) if where == "readers" else set()
    targets = [name for name in linear if name not in writers]
    if not targets:
        raise ExportError("no linear layer to train: the architecture has none that PEFT adapts")
    ends = {name.rpartition(".")[2] for name in targets}
    same = {n for n, _ in hf.named_modules() if n.rpartition(".")[2] in ends} == set(targets)
    return sorted(ends) if same else targets


def lora_config(hf: Any, recipe: Recipe, *, where: Where = "all") -> Any:
    """PEFT's configuration of the adapter: no dropout, no bias.

    Raises:
        RunError: PEFT is missing.
        ExportError: see `lora_targets`.
    """
    from transformers.pytorch_utils import Conv1D

    peft, _ = require_extra()
    return peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        lora_dropout=0.0,
        bias="none",
        target_modules=lora_targets(hf, where),
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in hf.modules()),
        task_type="CAUSAL_LM",
    )


# ---- rows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Tokens of a prompt and of the answer that the loss is on; `cut` where the answer was too long."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cut: bool = False


@dataclass(frozen=True, eq=False)
class Renderer:
    """Makes rows: the prompt through the chat template, the answer as it is, the turn's end after it."""

    tokenizer: Any = field(repr=False)
    template: str | None = None
    max_length: int = Recipe.max_length

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of the messages before an answer, open for it.

        Raises:
            PromptError: what the template cannot render.
        """
        roles = [message["role"] for message in messages]
        if roles in (["user"], ["system", "user"]):
            system = messages[0]["content"] if len(messages) == 2 else None
            prompt = Prompt(messages[-1]["content"], system)
            return encode(prompt, self.tokenizer, template=self.template)
        text = self._rendered(messages, open_ended=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(
        self, messages: Sequence[Mapping[str, str]], answer: str, *, finished: bool = True
    ) -> Row | None:
        """The tokens of a prompt and its answer; None where the prompt alone fills `max_length`.

        An answer that is not `finished` (a limit of new tokens cut it) gets no end of turn: a model trained
        on one would learn to stop there.
        """
        before = self.prompt(messages)
        room = self.max_length - len(before)
        if room < 1:
            return None
        after = list(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        after += [self.end_of_turn] if finished else []
        return Row(tuple(before), tuple(after[:room]), cut=len(after) > room)

    @cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer: what the template writes there, else the end of sequence.

        Raises:
            PromptError: the tokenizer has neither.
        """
        if self.template != "none" and (self.template or self.tokenizer.chat_template):
            mark = "interp ablate"
            turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
            text = self._rendered(turns, open_ended=False).rpartition(mark)[2]
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids[0] in self.tokenizer.all_special_ids:
                return int(ids[0])
        if self.tokenizer.eos_token_id is None:
            raise PromptError(
                "the tokenizer has no end-of-sequence token, and the chat template writes none: a "
                "trained model would never end its answers"
            )
        return int(self.tokenizer.eos_token_id)

    def _rendered(self, messages: Sequence[Mapping[str, str]], *, open_ended: bool) -> str:
        from jinja2.exceptions import TemplateError

        if self.template == "none" or not (self.template or self.tokenizer.chat_template):
            raise PromptError(
                "a conversation of several turns needs a chat template, and the model has none: "
                "give --template, or rows of one prompt and one answer"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_ended,
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template cannot render a conversation of "
                f"{', '.join(m['role'] for m in messages)}: {error}. Change those rows, or the template"
            ) from error
        return str(text)


# ---- trainers --------------------------------------------------------------------------------------


def quiet(kind: type) -> Any:
    """A TRL trainer that sends no telemetry, writes no card, and takes rows that are tokens already."""

    class Quiet(kind):  # type: ignore[misc, valid-type]
        def _send_telemetry(self) -> None:
            """TRL would tell the hub about every trainer that is made."""

        def create_model_card(self, *args: Any, **options: Any) -> None:
            """A card of TRL's beside every checkpoint is of no use here."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
            return dataset

    return Quiet


def common_arguments(base: Base, recipe: Recipe, work: Path) -> dict[str, Any]:
    """What SFTConfig and DPOConfig share: steps, device, determinism, no reports, checkpoints in `work`."""
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
        "disable_tqdm": True,
        "push_to_hub": False,
        "dataloader_pin_memory": False,
        "save_strategy": "steps",
        "save_steps": recipe.save_every,
        "save_total_limit": 1,
    }


@contextmanager
def workplace(out: str | Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """A hidden folder beside `out` for checkpoints: kept when the training is killed, removed when done.

    What lies there without a journal that says of which training it is, is removed first.

    Raises:
        RunError: it holds the checkpoints of another training, is in use, or cannot be written.
    """
    work = Path(out).parent / f".{Path(out).name}.training"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    journal = Lines(
        work / "journal.jsonl",
        {"training": digest},
        kind="training journal",
        format=JOURNAL_FORMAT,
        lost="the training starts over",
    )
    with journal.open() as kept:
        if not kept:  # a new one: checkpoints without a journal are of who knows what
            for place in work.iterdir():
                if place.is_dir():
                    shutil.rmtree(place)
            journal.append({"begun": True})
        yield work
    try:
        shutil.rmtree(work)
    except OSError as error:
        log.warning("%s is not needed any more, and could not be removed: %s", work, error)


def _last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint; one that was being written when the process died is removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in reversed(found):
        try:
            json.loads((path / _STATE).read_text())
        except (OSError, ValueError):
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


def make_trainer(kind: type, config: type, base: Base, **options: Any) -> Any:
    """A trainer of TRL's of some kind, made quiet, over a base; `config` is its settings' class.

    Embeddings that pad have the tokenizer's padding token, or its end of sequence.
    """
    if base.tokenizer.pad_token is None:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    settings = options.pop("settings")
    with _no_advice():
        return kind(
            model=base.hf, args=config(**settings), processing_class=base.tokenizer, **options
        )


def train(
    trainer: Any, work: Path, *, on_step: Callable[[int], None] | None = None
) -> list[dict[str, float]]:
    """Run a trainer, from its last checkpoint if there is one; returns what it logged, a dict a step.

    Raises:
        RunError: the loss is not finite.
    """
    from transformers import PrinterCallback, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if on_step:
                on_step(state.global_step)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps)
    # without a name PEFT does not ask the hub whether the vocabulary was resized
    trainer.model.peft_config["default"].base_model_name_or_path = ""
    with _no_advice():
        trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    wrong = [entry["step"] for entry in logged if not math.isfinite(entry["loss"])]
    if wrong:
        raise RunError(
            f"the loss is not finite from step {wrong[0]} of {len(logged)}: try a smaller "
            "--learning-rate, or --dtype float32"
        )
    return logged


def sft(
    base: Base,
    rows: Sequence[Row],
    recipe: Recipe,
    work: Path,
) -> Any:
    """TRL's SFTTrainer over rows, with a fresh adapter on all linear layers; the loss on answers alone.

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
        quiet(trl.SFTTrainer),
        trl.SFTConfig,
        base,
        settings=common_arguments(base, recipe, work),
        train_dataset=data,
        peft_config=lora_config(base.hf, recipe),
    )


# ---- what comes of it ------------------------------------------------------------------------------


@torch.no_grad()
def logits_of(hf: Any, rows: Sequence[Sequence[int]]) -> list[Float[Tensor, "pos d_vocab"]]:
    """Logits of each row at every position, a row at a time, in plain transformers."""
    device = next(hf.parameters()).device
    hf.eval()
    return [hf(input_ids=torch.tensor([row], device=device)).logits[0].float() for row in rows]


@dataclass(frozen=True, eq=False)
class Trained:
    """A merged model, and what its certificate needs: the unmerged adapter's logits on probes."""

    base: Base
    adapter: dict[str, Tensor] = field(repr=False)
    config: Any = field(repr=False)
    probes: list[list[int]] = field(repr=False)
    unmerged: list[Tensor] = field(repr=False)


def merge(base: Base, peft_model: Any, *, probes: Sequence[str] = PROBES) -> Trained:
    """The adapter added to the weights, in place; `base.hf` is then the merged model in plain transformers.

    Raises:
        RunError: the merged weights are not finite.
    """
    from peft import get_peft_model_state_dict

    rows = [encode(Prompt(text), base.tokenizer, template=base.template) for text in probes]
    unmerged = logits_of(peft_model, rows)
    adapter = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    config = peft_model.peft_config["default"]
    try:
        hf = peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # PEFT found NaN
        raise RunError(
            f"the adapter cannot be merged: {error}. Train with a smaller rate"
        ) from error
    vars(hf).pop("forward", None)  # TRL's own forward, over the class's
    hf.eval().requires_grad_(False)
    return Trained(
        Base(hf, base.tokenizer, base.source, base.template), stored, config, rows, unmerged
    )


def certify_merged(trained: Trained, folder: str | Path) -> dict[str, Any]:
    """Reload a folder in plain transformers, with no option, and compare it with the unmerged adapter.

    Returns the largest logit difference and KL at any position of the probes, the limits, which follow
    the dtype, and whether both hold.

    Raises:
        ExportError: transformers cannot load the folder.
    """
    from transformers import AutoModelForCausalLM

    try:
        reloaded: Any = AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ExportError(f"transformers cannot load {folder}: {error}") from error
    got = logits_of(reloaded.to(trained.base.device), trained.probes)
    gap = kl = 0.0
    for want, found in zip(trained.unmerged, got, strict=True):
        gap = max(gap, float((want - found).abs().max()))
        pair = (want.double().log_softmax(-1), found.double().log_softmax(-1))
        kl = max(kl, float(kl_divergence(*pair).max()))
    dtype = str(trained.base.dtype).removeprefix("torch.")
    limits = dict(zip(("max_abs_logit_difference", "kl"), LIMITS[dtype]))
    numbers = {"max_abs_logit_difference": gap, "kl": kl}
    failed = [name for name in limits if not numbers[name] <= limits[name]]
    return {
        "compared": "merged checkpoint, reloaded, with the unmerged adapter",
        **numbers,
        "limits": limits,
        "prompts": len(got),
        "failed": failed,
        "passed": not failed,
    }


def write_adapter(trained: Trained, folder: Path) -> None:
    """The adapter as PEFT loads it; a base that only this machine has is not named."""
    from safetensors.torch import save_file

    folder.mkdir()
    source = trained.base.source
    trained.config.base_model_name_or_path = (
        source.name if source.kind == "hub" else source.base_model
    )
    trained.config.inference_mode = True
    trained.config.save_pretrained(folder)
    save_file(trained.adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)


def write_trained(trained: Trained, place: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """The merged checkpoint and `adapter/` into an empty folder, certified twice; returns the certificate.

    The checkpoint is held against the model in memory (as every export) and, under "adapter", against
    the unmerged adapter. `what` goes into the manifest as "trained".

    Raises:
        ExportError: one of the two comparisons failed, or the place cannot be written.
    """
    inside = place / "merged"
    certificate = export_checkpoint(trained.base.model, None, inside)
    certificate["adapter"] = certify_merged(trained, inside)
    if not certificate["adapter"]["passed"]:
        raise ExportError(
            f"the merged checkpoint is not the trained adapter: {certificate['adapter']}. Nothing was "
            "left on disk; merge in --dtype float32"
        )
    for path in sorted(inside.iterdir()):
        os.replace(path, place / path.name)
    inside.rmdir()
    write_adapter(trained, place / ADAPTER)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["trained"] = dict(what)
    manifest["versions"] = versions(*PACKAGES)
    write_json(place / MANIFEST, manifest)
    write_json(place / CERTIFICATE, certificate)
    return certificate


# ---- what is reported -------------------------------------------------------------------------------


def summarised(values: Sequence[float | None], *, proportion: bool = False) -> dict[str, Any]:
    """Mean and interval over the prompts (or questions) with a value, how many these are and how many have none."""
    known = [value for value in values if value is not None]
    return {
        "mean": float(np.mean(known)) if known else None,
        "interval": list(bootstrap_interval(known, proportion=proportion)) if known else None,
        "n": len(known),
        "no_value": len(values) - len(known),
    }


def apart(some: Sequence[float | None], others: Sequence[float | None]) -> dict[str, Any]:
    """`some` minus `others` over the prompts at which both have a value: `summarised`."""
    pairs = zip(some, others, strict=True)
    return summarised([None if a is None or b is None else a - b for a, b in pairs])

"""How a model is loaded: the options that `load_model`, every command and every run share.

Knows: the options, their defaults and help. Does not know: how a model is loaded. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from interp_ablate.prompts.chat_format import ChatFormat, ReadPart, parse_args, unescaped
from interp_ablate.settings import MAX_THOUGHT_TOKENS, setting

BackendName = Literal["bridge", "hooked", "hf"]
BackendChoice = Literal["auto", "bridge", "hooked", "hf"]
# Settings that a chat format is made of.
CHAT_SETTINGS = (
    *("template", "template_args", "response_prefix"),
    *("thought_tags", "max_thought_tokens", "read"),
)


@dataclass(frozen=True)
class HFLoadingOptions:
    """How a Hugging Face model is loaded, beside its name."""

    dtype: str = setting("float32", "of the weights: float32, bfloat16, float16, float64")
    device: str = setting("cpu", "cpu, cuda, mps, or auto (layers spread over all GPUs)")
    template: str | None = setting(
        None, "Jinja chat template, the name of one of the model's, or 'none' (raw text)"
    )
    template_args: tuple[str, ...] = setting(
        (),
        "a variable of the chat template, such as enable_thinking=false; may be given again",
        flag="template-arg",
        metavar="NAME=VALUE",
        repeat=True,
    )
    response_prefix: str = setting(
        "", "text that every answer starts with, after the prompt (\\n for a line break)"
    )
    thought_tags: tuple[str, ...] = setting(
        (), "what stands around a thought, such as <think>,</think> (default: the template's own)"
    )
    max_thought_tokens: int = setting(
        MAX_THOUGHT_TOKENS, "tokens of a thought, at most, beside those of the answer"
    )
    read: ReadPart = setting(
        "answer", "part of what a thinking model writes that is read", choices=get_args(ReadPart)
    )
    trust_remote_code: bool = setting(False, "run Python code that a model folder brings")
    revision: str | None = setting(
        None, "branch, tag or commit of a model that is named by its hub name"
    )

    def __post_init__(self) -> None:
        self.chat_format  # noqa: B018  (bad values fail before any work)

    @property
    def chat_format(self) -> ChatFormat:
        """How prompts are put to the model.

        Raises:
            PromptError: a variable that cannot be read.
        """
        return ChatFormat(
            self.template,
            parse_args(self.template_args),
            unescaped(self.response_prefix),
            tuple(self.thought_tags) or None,  # type: ignore[arg-type]
            self.max_thought_tokens,
            self.read,
        )

    @property
    def loading(self) -> dict[str, Any]:
        """The options alone, as keyword arguments of the loader."""
        names = [f.name for f in fields(LoadingOptions) if f.name not in CHAT_SETTINGS]
        options = {name: getattr(self, name) for name in names if name in vars(self)}
        return {**options, "template": self.chat_format}


@dataclass(frozen=True)
class LoadingOptions(HFLoadingOptions):
    """How a model with hook points is loaded, beside its name."""

    backend: BackendChoice = setting(
        "auto",
        "what runs the model: TransformerLens' bridge or hooked, plain transformers (hf), or auto",
        choices=get_args(BackendChoice),
    )


DEFAULTS = LoadingOptions()

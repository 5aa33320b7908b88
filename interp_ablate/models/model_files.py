"""Model files at the gate: a folder or GGUF file is checked before transformers opens it.

transformers and the libraries below believe what they read: an index that leads out of the folder, a count of 10^9
layers, a pipe in place of a shard, a tensor that is missing (random numbers stand in for it). So everything is read
here first, without data, and whatever they raise all the same is one message.

Knows: which files transformers opens, which numbers of a config make it build something, what loading reports.
Does not know: plans, sites, or what a model is wanted for.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_ablate.errors import InterpAblateError, ModelError
from interp_ablate.storage.gguf_header import (
    Fault,
    GGUFTensor,
    gguf_bytes,
    read_gguf_header,
    whole_number,
)
from interp_ablate.storage.incoming_files import (
    WHOLE,
    check_file,
    incoming_object,
    incoming_text,
    shortened,
)
from interp_ablate.storage.json_shapes import optional

if TYPE_CHECKING:
    from interp_ablate.storage.safetensors_reader import Checkpoint

logger = logging.getLogger(__name__)

QUANTIZATION = "quantization_config"
CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
_OBJECTS = (
    *(GENERATION, "tokenizer.json", "vocab.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
_READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt")  # others may be pointers
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MAX_CONFIG, _MAX_TEMPLATE = 1 << 24, 1 << 20  # bytes
# Numbers of a config or of GGUF keys by which modules are counted and axes are long; and those that are neither.
_LAYERS = re.compile(r"num_(hidden_)?layers|n_layers?")
_SIZES = re.compile(
    "vocab|hidden|intermediate|embed|embd|inner|ffn|head|expert|d_model|d_ff|dim|feed"
)
_FREE = re.compile(r"position|context_length|_ids?$|_ind(ex|ices)$|_idx$|_type$")
_SMALL = 1_000_000  # a size that any machine can make room for
_DTYPES = ("float32", "float16", "bfloat16", "float64")
_GENERATION = {"eos_token_id": optional((int, [int]))}


def check_folder(folder: str | Path, *, trust_remote_code: bool = False) -> None:
    """Check every file of a Hugging Face folder that transformers opens, and that its tensors are the config's.

    No data is read: the model is built on torch's meta device, and held to the headers by name and shape.

    Raises:
        ModelError: naming the file or the tensors, what is wrong, and what to do.
    """
    from interp_ablate.storage.dequantized_checkpoint import PACKED, method_of  # needs torch
    from interp_ablate.storage.safetensors_reader import INDEX, SINGLE, Checkpoint

    folder = Path(folder)
    config = read_config(folder)
    try:
        _check_files(folder)
        if any((folder / name).exists() for name in (_PICKLE, _PICKLE_INDEX)) and not any(
            (folder / name).exists() for name in (SINGLE, INDEX)
        ):
            n_tensors, nbytes = _check_pickles(folder)
        else:
            checkpoint = Checkpoint.open(folder)
            n_tensors, nbytes = (
                len(checkpoint.tensors), sum(file.size for file in checkpoint.files)
            )  # fmt: skip
            _check_dtypes(checkpoint, config)
    except InterpAblateError as error:
        raise ModelError(str(error)) from error
    _check_counts(config, n_tensors, nbytes, folder / CONFIG)
    _check_quantization(config, folder)
    with transformers_reads(f"{folder}/{GENERATION}"):
        _check_generation(folder)
    if not (about := config.get(QUANTIZATION)) or method_of(about) in PACKED:
        # of others only their own quantizers know the tensors
        _load_without_data(folder, config, trust_remote_code)


def check_loadable(folder: str | Path) -> None:
    """Check that a folder loads whole, its tokenizer too; see `check_folder`.

    A tokenizer without tokenizer.json needs packages that nobody else needs here, and is not loaded.

    Raises:
        ModelError: what is wrong with it, and what to do.
    """
    check_folder(folder)
    if (Path(folder) / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        with transformers_reads(f"the tokenizer of {folder}"):
            AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@contextmanager
def transformers_reads(what: str, advice: str = WHOLE) -> Iterator[None]:
    """Whatever transformers raises inside the block over `what` becomes one message.

    It is somebody else's program over somebody else's file: which exception it ends in says nothing.

    Raises:
        ModelError: with the first line of the reason.
    """
    try:
        yield
    except InterpAblateError:
        raise
    except ImportError as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise ModelError(
            f"transformers needs a package that is not installed here to load {what}: {reason}"
        ) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = shortened(lines[0], 300)
        raise ModelError(
            f"transformers cannot load {what}: {reason} ({type(error).__name__}); {advice}"
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder as it stands.

    Raises:
        ModelError: none, or no JSON object.
    """
    path = Path(folder) / CONFIG
    if not path.exists():
        raise ModelError(f"{folder} has no {CONFIG}: expected a Hugging Face checkpoint")
    config = incoming_object(path, error=ModelError, limit=_MAX_CONFIG)
    for key in ("dtype", "torch_dtype"):
        name = config.get(key)
        if name is not None and str(name).removeprefix("torch.") not in (*_DTYPES, "auto"):
            raise ModelError(
                f"{path} has {key} = {shortened(repr(name))}: accepted are {', '.join(_DTYPES)}"
            )
    return config


def _check_files(folder: Path) -> None:
    """What transformers opens is files, JSON and text; nothing in the folder is a pipe."""
    for path in sorted((*folder.iterdir(), *folder.glob("additional_chat_templates/*"))):
        if path.exists() and not path.is_dir() and (path.suffix in _READ or not path.is_file()):
            check_file(path, ModelError)
        if path.suffix == ".jinja" and path.is_file():
            incoming_text(path, error=ModelError, limit=_MAX_TEMPLATE)
    for name in _OBJECTS:
        if (folder / name).exists():
            # a vocabulary may name a token twice: what that means is its reader's affair
            unique = name not in ("tokenizer.json", "vocab.json")
            shape = _GENERATION if name == GENERATION else None
            content = incoming_object(folder / name, error=ModelError, unique=unique, shape=shape)
            template = content.get("chat_template")
            if name != "vocab.json" and not isinstance(template, str | list | dict | None):
                raise ModelError(
                    f"{folder / name} has chat_template = {template!r}, which is no text"
                )


def _check_dtypes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if config.get("quantization_config"):
        return
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight") and not info.dtype.is_floating_point:
            raise ModelError(
                f"{info.file} has {name} as {str(info.dtype).removeprefix('torch.')}, and its config names no "
                f"quantization: weights are {', '.join(_DTYPES)}. Write them again, or add the "
                "quantization_config that they were made with"
            )


def _check_quantization(config: Mapping[str, Any], folder: Path) -> None:
    """transformers takes an unknown kind for none, and the tensors for weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    about = config.get("quantization_config") or {}
    if not isinstance(about, dict):
        raise ModelError(f"{folder / CONFIG} has a quantization_config that is no object")
    named = about.get("quant_method") is not None
    kind = str(about.get("quant_method"))
    if named and kind not in AUTO_QUANTIZATION_CONFIG_MAPPING and "load_in_8bit" not in about:
        raise ModelError(
            f"{folder / CONFIG} says that it is quantized by {shortened(repr(kind))}, which this transformers "
            "does not know: give the weights before quantization"
        )


def _check_pickles(folder: Path) -> tuple[int, int]:
    """Whole torch files, which transformers reads without running their code; tensors and bytes in them."""
    from interp_ablate.storage.safetensors_reader import is_plain

    names, n_tensors = [_PICKLE], 0
    if not (folder / _PICKLE).exists():
        weight_map = incoming_object(folder / _PICKLE_INDEX, error=ModelError).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            is_plain(name, ".bin") for name in weight_map.values()
        ):
            raise ModelError(
                f"{folder / _PICKLE_INDEX} must name a .bin file of this folder for every tensor"
            )
        names = sorted(set(weight_map.values()))
    nbytes = 0
    for name in names:
        nbytes += check_file(folder / name, ModelError)
        try:
            with zipfile.ZipFile(folder / name) as archive:
                n_tensors += len(archive.namelist())
        except (zipfile.BadZipFile, OSError) as error:
            with (folder / name).open("rb") as file:
                if file.read(1) == b"\x80":  # torch's older kind
                    n_tensors += nbytes // 64
                    continue
            raise ModelError(
                f"{folder / name} is not a whole file of torch ({error}): {WHOLE}"
            ) from error
    return n_tensors, nbytes


def _check_counts(
    config: Mapping[str, Any], n_tensors: int, nbytes: int, where: Path, inside: str = ""
) -> None:
    """No more layers than tensors, no axis longer than the weights: modules would be built for all of them."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, n_tensors, nbytes, where, f"{inside}{key}.")
        if not isinstance(value, int) or isinstance(value, bool) or _FREE.search(key):
            continue
        layers = _LAYERS.fullmatch(key)
        most = n_tensors if layers else max(nbytes, _SMALL)
        least = 1 if layers and not inside else 0
        if (layers and value < least) or (value > most and (layers or _SIZES.search(key))):
            raise ModelError(
                f"{where} has {inside}{key} = {shortened(value)}, and the weights beside it are {n_tensors} "
                f"tensors of {nbytes} bytes in all: they are not of one model"
            )


def _check_generation(folder: Path) -> None:
    from transformers import GenerationConfig

    if not (folder / GENERATION).exists():
        return
    config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    config.validate()
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"):
        value = getattr(config, name, None)
        if value is not None and not isinstance(value, (int, float)):
            raise ModelError(
                f"{folder / GENERATION} has {name} = {value!r}, where a number belongs"
            )


@contextmanager
def _without_adapter(folder: Path) -> Iterator[Path]:
    """The folder, or one of links to its files but for an adapter, which transformers would put on the model."""
    if not (folder / ADAPTER).exists():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for path in folder.iterdir():
            if not path.name.startswith("adapter"):
                (Path(place) / path.name).symlink_to(path.resolve())
        yield Path(place)


def _load_without_data(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    from interp_ablate.models.hf_classes import from_folder  # needs torch

    with transformers_reads(str(folder)), _without_adapter(folder) as place:
        parsed = AutoConfig.from_pretrained(
            str(place), local_files_only=True, trust_remote_code=trust_remote_code
        )
        loaded: Any = from_folder(
            place,
            parsed,
            data=False,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    check_report(loaded[1], str(folder), whole="text_config" not in config)


def check_report(report: Mapping[str, Any], name: str, *, whole: bool = True) -> None:
    """Hold what transformers says of a loading to "every tensor was there, and none was left".

    Args:
        whole: the model is all that the checkpoint holds, not the text part of several.

    Raises:
        ModelError: naming the tensors that are missing, mis-shaped or unknown.
    """
    faults = {
        "has no tensor": sorted(report["missing_keys"]),
        "has in another shape than its config says": sorted(
            f"{key} {list(there)} instead of {list(wanted)}"
            for key, there, wanted in report["mismatched_keys"]
        ),
        "has, unknown to its model": sorted(report["unexpected_keys"]) if whole else [],
        "fails in": sorted(map(str, report.get("error_msgs", ()))),
    }
    said = [
        f"{fault} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for fault, names in faults.items()
        if names
    ]
    if said:
        raise ModelError(
            f"{name} {'; '.join(said)}. transformers would fill what is missing with random numbers: {WHOLE}, "
            "or mend config.json"
        )


def check_gguf(path: str | Path) -> None:
    """Check the header of a GGUF file of a model against the file and against itself.

    Raises:
        ModelError: cut short (by how much), a count or a size that the file cannot hold, an unknown type.
    """
    path = Path(path)

    def fault(what: str) -> ModelError:
        return ModelError(f"{path} {what}: {WHOLE}")

    with gguf_bytes(path, ModelError) as data:
        header, size = read_gguf_header(data, fault), len(data)
    kind = header.keys.get("general.architecture")
    if not isinstance(kind, str):
        raise fault("does not name its general.architecture")
    n_tensors = len(header.tensors)
    layers = whole_number(header.keys, f"{kind}.block_count", 0, fault)
    if not 1 <= layers <= n_tensors:
        raise fault(f"says that it has {layers} layers, and has {n_tensors} tensors")
    _check_counts({**header.keys, "num_layers": layers}, n_tensors, size, path)
    names = [tensor.name for tensor in header.tensors]
    if len(set(names)) < n_tensors:
        raise fault("has two tensors of one name")
    end = max(_end(tensor, fault) for tensor in header.tensors)
    if end > size:
        raise fault(f"is cut short: {end - size} of {end} bytes are missing at the end")


def _end(tensor: GGUFTensor, fault: Fault) -> int:
    """Where the bytes of a tensor end, by its type and shape."""
    import gguf

    try:
        per_block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    except (KeyError, ValueError) as error:
        raise fault(
            f"has {tensor.name} in ggml's type {tensor.kind}, which nothing knows"
        ) from error
    if not 0 < len(tensor.shape) <= 4 or min(tensor.shape) < 1 or tensor.shape[0] % per_block:
        raise fault(f"has {tensor.name} with shape {shortened(list(tensor.shape))}")
    return tensor.offset + math.prod(tensor.shape) // per_block * nbytes

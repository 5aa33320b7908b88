"""Directions out of the files of other tools: Arditi's, control vectors, plain tensors.

Knows: .pt, .npy, .safetensors and .gguf files, and how their names tell a site. Does not know: how a direction was
estimated, or any file that has to be unpickled (those are refused).
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from tokenize import TokenError
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_ablate.directions.direction import Direction, Separation
from interp_ablate.directions.direction_set import FORMAT as DIRECTIONS_FORMAT
from interp_ablate.directions.direction_set import (
    PLAIN_FORMAT,
    Directions,
    from_record,
    separation_in,
)
from interp_ablate.directions.gguf_vectors import read_gguf_vectors
from interp_ablate.errors import DirectionError, InterpAblateError
from interp_ablate.sites import POINTS, Point, Site, SiteLike
from interp_ablate.storage.incoming_files import check_file, incoming_object, parse_json

UNKNOWN = "unknown"  # the position of a vector whose file does not tell it
METADATA = "direction_metadata.json"
ARDITI = "Arditi et al. 2024, https://arxiv.org/abs/2406.11717"
PICKLES = (".pkl", ".pickle", ".joblib", ".bin")

_LAYER_NAME = re.compile(r"(?:.*[._])?(?:layers?|blocks?|h)[._](\d+)|(\d+)")
_PLACE_NAME = re.compile(r"(?:(?P<method>[^@\[\]]+)@)?(?P<site>[^@\[\]]+)(?:\[(?P<position>.+)\])?")
_CONVERT = """Where you trust it, convert it once and read the result:
    import torch; from safetensors.torch import save_file
    vectors = torch.load({file!r}, weights_only=False)  # runs code of the file; or pickle.load(open(...))
    save_file({{f"blocks.{{i}}.hook_resid_post": v.float() for i, v in vectors.layer_activations.items()}}, "v.safetensors")
(`layer_activations` is what steering-vectors' SteeringVector holds: the outputs of its decoder blocks)"""


@dataclass(frozen=True)
class _FileTensor:
    """One tensor of a file, with what the file itself says about it."""

    name: str
    tensor: Tensor
    site: Site | None = None
    position: str | None = None
    method: str = "imported"
    source: str = ""
    separation: Separation | None = None
    record: dict[str, Any] | None = None
    """The metadata that `write_directions` wrote."""


def read_directions(
    path: str | Path,
    *,
    site: SiteLike | None = None,
    point: Point | None = None,
    position: str | None = None,
    d_model: int | None = None,
) -> Directions:
    """The directions of one file: Arditi's, a control vector, or tensors in .pt, .npy, .safetensors.

    A vector's length is kept as the direction's `norm`. Vectors of zeros beside others (a layer that a
    control vector leaves alone) are listed in `left_out`.

    Args:
        site: where the vector lives, for a file that does not say; of a file that does, only that site.
        point: the point of the block, for tensors named by a layer only (`layer.3`, `3`).
        position: the token position of the vector, for a file that does not say; of a file that does,
            only that position.
        d_model: the length every vector must have. Default: any, the same for all.

    Raises:
        DirectionError: a file that cannot be read or would have to be unpickled, a vector without a
            site, NaN, zeros, a wrong shape or dtype, or nothing at the site and position asked for.
    """
    path, site = Path(path), site if site is None else Site.parse(site)
    if point is not None and point not in POINTS:
        raise DirectionError(f"unknown point {point!r}: accepted are {', '.join(POINTS)}")
    if path.suffix == ".safetensors" and _is_a_directions_file(path):
        every = Directions.load(path)
    else:
        placed = _placed(list(_tensors_of(path)), path, site=site, point=point)
        every = _directions(placed, path, position)
    items = tuple(
        item for item in every if site in (None, item.site) and position in (None, item.position)
    )
    if not items:
        places = [f"{item.site}[{item.position}]" for item in every]
        raise DirectionError(
            f"{path} has no direction at {site or 'any site'}[{position or 'any position'}]: it has "
            f"{', '.join(places[:6])}" + (" and more" if len(places) > 6 else "")
        )
    width = d_model or len(items[0].vector)
    wrong = {len(item.vector) for item in items} - {width}
    if wrong:
        raise DirectionError(
            f"{path} holds vectors of length {sorted(wrong)}, and d_model is {width}: it was made for "
            "another model"
        )
    return Directions(items, every.left_out, every.source)


def _tensors_of(path: Path) -> list[_FileTensor]:
    """Every tensor of a file, by its ending."""
    if path.suffix in PICKLES:
        raise DirectionError(f"{path} is a pickle, and is not read: {_convert(path)}")
    if path.suffix not in _READERS:
        raise DirectionError(
            f"cannot tell what {path} is by its ending {path.suffix!r}: accepted are "
            f"{', '.join(_READERS)}"
        )
    check_file(path, DirectionError)
    return list(_READERS[path.suffix](path))


def _convert(path: Path) -> str:
    return "unpickling runs whatever code the file holds. " + _CONVERT.format(file=path.name)


# Errors of torch for a file that is not whole: bytes in the wrong place are read as any instruction.
_RUINS = (
    *(UnpicklingError, OSError, RuntimeError, EOFError, ValueError, TypeError),
    *(KeyError, IndexError, AttributeError, AssertionError, struct.error),
)


def _is_a_pickle(path: Path) -> bool:
    """True for a whole torch archive and for a bare pickle, False for ruins."""
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _from_torch(path: Path) -> Iterator[_FileTensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _RUINS as error:
        if isinstance(error, UnpicklingError) and _is_a_pickle(path):
            raise DirectionError(f"{path} holds more than tensors: {_convert(path)}") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DirectionError(f"cannot read {path}: {reason}. Is the file whole?") from error
    if isinstance(loaded, Tensor) and loaded.ndim == 3 and path.name == "mean_diffs.pt":
        yield from _from_mean_differences(loaded, path)
    elif isinstance(loaded, Tensor):
        yield _FileTensor(path.name, loaded, **_arditi_place(path))
    elif (
        isinstance(loaded, dict) and loaded and all(isinstance(v, Tensor) for v in loaded.values())
    ):
        yield from (_named(str(name), tensor) for name, tensor in loaded.items())
    else:
        kinds = type(loaded).__name__
        if isinstance(loaded, dict):
            kinds += f" of {sorted({type(value).__name__ for value in loaded.values()})}"
        raise DirectionError(
            f"{path} holds a {kinds}: accepted are one tensor, or a dict of names and tensors"
        )


def _from_mean_differences(
    table: Float[Tensor, "pos layer d_model"], path: Path
) -> Iterator[_FileTensor]:
    """Arditi's candidates: the last positions of the template, by the layer whose input was read."""
    count, n_layers, _ = table.shape
    for place in range(count):
        for layer in range(n_layers):
            position, site = str(place - count), Site(layer, "resid_pre")
            name = f"mean_diffs[{position}, {layer}]"
            vector = table[place, layer]
            yield _FileTensor(name, vector, site, position, "difference_in_means", ARDITI)


def _arditi_place(path: Path) -> dict[str, Any]:
    """Site and position in the direction_metadata.json beside a direction.pt; empty where there is none."""
    beside = path.with_name(METADATA)
    if path.name != "direction.pt" or not beside.is_file():
        return {}
    try:
        metadata = incoming_object(beside)
        # The paper reads a block's input: layer l is resid_pre(l).
        site, position = Site(metadata["layer"], "resid_pre"), str(int(metadata["pos"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DirectionError(
            f'cannot read {beside}: {error!r}. Expected are {{"pos": -2, "layer": 10}} or no such file'
        ) from error
    return {"site": site, "position": position, "method": "difference_in_means", "source": ARDITI}


def _from_numpy(path: Path) -> Iterator[_FileTensor]:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")  # a lying shape costs nothing
    except (OSError, ValueError, EOFError, TokenError) as error:
        if "Python objects" in str(error):
            raise DirectionError(
                f"{path} is no plain array but Python objects, and is not read: unpickling runs "
                "whatever code the file holds. Where you trust it, convert it once: "
                "np.save('v.npy', np.load('old.npy', allow_pickle=True).astype('float32'))"
            ) from error
        raise DirectionError(f"cannot read {path} as .npy: {error}. Is it whole?") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = getattr(array, "dtype", type(array).__name__)
        raise DirectionError(f"{path} holds {kind}: a direction needs an array of floats")
    yield _FileTensor(path.name, torch.from_numpy(array.astype(np.float64)))


def _from_safetensors(path: Path) -> Iterator[_FileTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {}).get("interp_ablate", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise DirectionError(f"cannot read {path}: {error}. Is the file whole?") from error
    if not isinstance(about, dict) or about.get("format") != PLAIN_FORMAT:
        yield from (_named(name, tensor) for name, tensor in tensors.items())
        return
    try:
        if about["directions"].keys() != tensors.keys():
            raise TypeError(f"tensors {sorted(tensors)[:4]}")
        for name, record in about["directions"].items():  # in the order they were written in
            yield _recorded(name, tensors[name], {**record, "raw": about["raw"]})
    except (KeyError, TypeError, AttributeError, InterpAblateError) as error:
        raise DirectionError(
            f"the metadata of {path} do not describe its tensors: {error!r}. Write the file again, or "
            "drop its metadata"
        ) from error


def _recorded(name: str, tensor: Tensor, record: dict[str, Any]) -> _FileTensor:
    site, position, method = Site.parse(record["site"]), record["position"], record["method"]
    if not (isinstance(record["norm"], float) and 0 < record["norm"] < float("inf")):
        raise TypeError(f"the norm of {name!r} is {record['norm']!r}")
    return _FileTensor(
        name, tensor, site, position, method, record["source"], separation_in(record), record
    )


def _from_gguf(path: Path) -> Iterator[_FileTensor]:
    """A control vector: `direction.N` is added to the output of block N, which is Site(N, "resid_post").

    llama.cpp and repeng count blocks from 0 and leave block 0 alone. A vector's length is the strength it was
    made for.
    """
    file = read_gguf_vectors(path)
    source = path.name + (f", made for {file.model_hint}" if file.model_hint else "")
    for block, vector in file.vectors.items():
        site = Site(block, "resid_post")
        yield _FileTensor(f"direction.{block}", vector, site, None, "control_vector", source)


_READERS: dict[str, Callable[[Path], Iterator[_FileTensor]]] = {
    ".pt": _from_torch,
    ".pth": _from_torch,
    ".npy": _from_numpy,
    ".safetensors": _from_safetensors,
    ".gguf": _from_gguf,
}


def _is_a_directions_file(path: Path) -> bool:
    """True for what `Directions.save` wrote: its JSON beside it says so."""
    beside = path.with_suffix(".json")
    try:
        return bool(incoming_object(beside).get("format") == DIRECTIONS_FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _named(name: str, tensor: Tensor) -> _FileTensor:
    """A tensor with the site, position and method in its name, such as `blocks.3.hook_resid_pre[-1]`."""
    match = _PLACE_NAME.fullmatch(name)
    try:
        site = Site.parse(match["site"] if match else name)
    except InterpAblateError:
        return _FileTensor(name, tensor)
    assert match is not None
    return _FileTensor(name, tensor, site, match["position"], match["method"] or "imported")


def _placed(
    tensors: list[_FileTensor], path: Path, *, site: Site | None, point: Point | None
) -> list[_FileTensor]:
    """Every tensor with its site: the one the file names, else its layer and a point, else `site`."""
    point = point or (site.point if site else None)
    placed = []
    for item in tensors:
        layer = _LAYER_NAME.fullmatch(item.name) if item.site is None else None
        if layer is not None and point is None:
            raise DirectionError(
                f"{path} names a layer, {item.name!r}, but not where in it the vector lives: pass "
                "point='resid_pre' for the input of the block, 'resid_post' for its output, or another "
                f"of {', '.join(POINTS)}"
            )
        if layer is not None and point is not None:
            item = replace(item, site=Site(int(layer[1] or layer[2]), point))
        elif item.site is None and len(tensors) == 1 and site is not None:
            item = replace(item, site=site)
        placed.append(item)
    without = [item.name for item in placed if item.site is None]
    if without and len(tensors) > 1:
        raise DirectionError(
            f"{path} holds {len(tensors)} tensors, and the names {without[:4]} are no sites: name them like "
            "'blocks.3.hook_resid_pre', or keep one tensor a file and pass site=Site(layer, point)"
        )
    if without:
        raise DirectionError(
            f"{path} does not say where its vector lives: pass site=Site(layer, point), such as "
            "Site(10, 'resid_pre') for the input of block 10"
        )
    return placed


def _directions(tensors: list[_FileTensor], path: Path, position: str | None) -> Directions:
    """The tensors as directions; those of zeros are left out, if there are others."""
    items, left_out = [], {}
    for item in tensors:
        tensor, shape = item.tensor.detach(), tuple(item.tensor.shape)
        if not tensor.is_floating_point() or tensor.ndim != 1 or not len(tensor):
            raise DirectionError(
                f"{item.name!r} of {path} has shape {list(shape)} in {tensor.dtype}: a direction is one "
                "vector of floats, [d_model]; save the one you want, or one tensor a vector"
            )
        if not torch.isfinite(tensor).all():
            raise DirectionError(
                f"{item.name!r} of {path} holds NaN or infinity: estimate it again in float32 or better"
            )
        if tensor.any():
            items.append(_direction(item, position))
        else:
            left_out[f"{item.site}[{item.position or position or UNKNOWN}]"] = (
                f"{item.name!r} of {path.name} is all zeros"
            )
    if not items:
        raise DirectionError(
            f"{path} holds {'no vector' if not left_out else 'only zeros'}: nothing can be ablated or "
            "added along it"
        )
    if not any(item.record for item in tensors):  # safetensors sorts by name, repeng the last first
        items.sort(key=lambda item: item.site.order)
    return Directions(tuple(items), left_out, items[0].source)


def _direction(item: _FileTensor, position: str | None) -> Direction:
    assert item.site is not None
    vector, about = item.tensor.double(), item.record
    if about is not None and item.tensor.dtype == torch.float64 and not about["raw"]:
        return from_record(about, vector)  # the unit vector bit for bit
    norm = about["norm"] if about is not None else float(vector.norm())
    place = item.position or position or UNKNOWN
    return Direction(
        vector, norm, item.site, place, item.method, item.separation, source=item.source
    )

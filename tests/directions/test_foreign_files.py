"""Vectors of other tools: read where they live, refused where a file does not say or must be unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interp_ablate.directions.direction import Direction, Separation
from interp_ablate.directions.direction_set import Directions, write_directions
from interp_ablate.directions.foreign_files import read_directions
from interp_ablate.errors import DirectionError
from interp_ablate.sites import Site

PUBLISHED = Path(__file__).parents[1] / "data" / "arditi"
D_MODEL = 12
PRE, POST = Site(3, "resid_pre"), Site(3, "resid_post")


def vector(seed: int = 0, length: int = D_MODEL) -> Tensor:
    return 3 * torch.randn(length, generator=torch.Generator().manual_seed(seed))


def check(found: Directions, wanted: dict[tuple[str, str], Tensor]) -> None:
    """Exactly these vectors, at these sites and positions, with their lengths."""
    assert {(str(d.site), d.position) for d in found} == set(wanted)
    for item in found:
        want = wanted[str(item.site), item.position].double()
        torch.testing.assert_close(item.raw, want, rtol=1e-12, atol=1e-12)
        assert item.norm == pytest.approx(float(want.norm()))


class Steering:
    """A class of another package, as steering-vectors pickles one."""

    def __init__(self) -> None:
        self.layer_activations = {3: vector()}


# --------------------------------------------------------------------------------- Arditi's files


@pytest.mark.parametrize("name", ("gemma-2b-it", "qwen-1_8b-chat", "meta-llama-3-8b-instruct"))
def test_arditi_direction(tmp_path: Path, name: str) -> None:
    shutil.copy(PUBLISHED / name / "direction_metadata.json", tmp_path)
    given = json.loads((tmp_path / "direction_metadata.json").read_text())
    torch.save(vector().double(), tmp_path / "direction.pt")
    found = read_directions(tmp_path / "direction.pt")
    check(found, {(f"blocks.{given['layer']}.hook_resid_pre", str(given["pos"])): vector()})
    assert found.items[0].method == "difference_in_means" and "2406.11717" in found.source
    with pytest.raises(DirectionError, match=rf"no direction at .*it has blocks.{given['layer']}"):
        read_directions(tmp_path / "direction.pt", site=Site(0, "resid_pre"))


def test_arditi_metadata_that_say_nothing(tmp_path: Path) -> None:
    torch.save(vector(), tmp_path / "direction.pt")
    with pytest.raises(DirectionError, match=r"does not say where.*pass site=Site\(layer, point\)"):
        read_directions(tmp_path / "direction.pt")
    for text in ('{"pos": -2}', '{"pos": -2, "layer": -1}', '{"pos": -2, "layer": 1.5}', "[]", "{"):
        (tmp_path / "direction_metadata.json").write_text(text)
        with pytest.raises(DirectionError, match=r"cannot read .*direction_metadata.json"):
            read_directions(tmp_path / "direction.pt")


def test_arditi_mean_differences(tmp_path: Path) -> None:
    table = torch.stack([vector(i) for i in range(15)]).reshape(5, 3, D_MODEL).double()
    table[4, 0] = 0  # the last template token at the first layer: the same whatever the prompt
    path = tmp_path / "mean_diffs.pt"
    torch.save(table, path)
    found = read_directions(path)
    places = [
        (place, layer) for place in range(5) for layer in range(3) if (place, layer) != (4, 0)
    ]
    wanted = {
        (f"blocks.{i}.hook_resid_pre", str(place - 5)): table[place, i] for place, i in places
    }
    check(found, wanted)
    assert list(found.left_out) == ["blocks.0.hook_resid_pre[-1]"]
    one = read_directions(path, site=Site(1, "resid_pre"), position="-2")
    check(one, {("blocks.1.hook_resid_pre", "-2"): table[-2, 1]})
    assert len(read_directions(path, position="-2")) == 3
    with pytest.raises(DirectionError, match=r"no direction at any site\[-6\]"):
        read_directions(path, position="-6")
    torch.save(table, tmp_path / "other.pt")
    with pytest.raises(DirectionError, match=r"shape \[5, 3, 12\].*one vector of floats"):
        read_directions(tmp_path / "other.pt", site=PRE)


# --------------------------------------------------------------------------------- plain tensors


def save(path: Path, tensor: Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, tensor.numpy())
    elif path.suffix == ".safetensors":
        save_file({"anything": tensor}, path)
    else:
        torch.save(tensor, path)
    return path


@pytest.mark.parametrize("file", ("v.pt", "v.pth", "v.npy", "v.safetensors"))
def test_one_vector(tmp_path: Path, file: str) -> None:
    path = save(tmp_path / file, vector())
    check(read_directions(path, site=PRE), {("blocks.3.hook_resid_pre", "unknown"): vector()})
    found = read_directions(path, site=POST, position="-1", d_model=D_MODEL)
    check(found, {("blocks.3.hook_resid_post", "-1"): vector()})
    with pytest.raises(
        DirectionError, match=r"does not say where its vector lives: pass site=Site"
    ):
        read_directions(path)
    with pytest.raises(DirectionError, match=r"length \[12\], and d_model is 13"):
        read_directions(path, site=PRE, d_model=13)


@pytest.mark.parametrize("file", ("v.pt", "v.npy", "v.safetensors"))
@pytest.mark.parametrize(
    ("tensor", "message"),
    (
        (torch.zeros(D_MODEL), "only zeros"),
        (vector() * float("nan"), "NaN or infinity"),
        (vector().index_fill(0, torch.tensor([2]), float("inf")), "NaN or infinity"),
        (vector()[None], r"shape \[1, 12\]"),
        (torch.tensor(1.0), r"shape \[\]"),
        (torch.zeros(0), r"shape \[0\]"),
        (torch.arange(D_MODEL), r"int64"),
    ),
)
def test_vectors_that_are_none(tmp_path: Path, file: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(DirectionError, match=message):
        read_directions(save(tmp_path / file, tensor), site=PRE)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    for file in ("v.pt", "v.safetensors"):
        path = save(tmp_path / file, vector().to(dtype))
        want = {("blocks.3.hook_resid_pre", "unknown"): vector().to(dtype)}
        check(read_directions(path, site=PRE), want)


def test_big_endian_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", vector().numpy().astype(">f4"))
    found = read_directions(tmp_path / "v.npy", site=PRE)
    check(found, {("blocks.3.hook_resid_pre", "unknown"): vector()})


def save_named(path: Path, tensors: dict[Any, Tensor]) -> Path:
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({str(name): tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("file", ("v.pt", "v.safetensors"))
def test_names_that_are_sites(tmp_path: Path, file: str) -> None:
    names = ("blocks.10.hook_resid_pre", "blocks.2.hook_resid_post", "hook_embed", "4.mlp_out[-2]")
    path = save_named(tmp_path / file, {name: vector(i) for i, name in enumerate(names)})
    found = read_directions(path)
    places = [(name, "unknown") for name in names[:3]] + [("blocks.4.hook_mlp_out", "-2")]
    check(found, {place: vector(i) for i, place in enumerate(places)})
    assert [d.site.layer for d in found] == [0, 2, 4, 10]  # forward order
    check(read_directions(path, site=Site(2, "resid_post")), {places[1]: vector(1)})


@pytest.mark.parametrize("file", ("v.pt", "v.safetensors"))
@pytest.mark.parametrize("pattern", ("layer.{}", "layers.{}", "model.layers.{}", "layer_{}", "{}"))
def test_names_of_a_layer_need_a_point(tmp_path: Path, file: str, pattern: str) -> None:
    path = save_named(tmp_path / file, {pattern.format(i): vector(i) for i in (2, 11)})
    with pytest.raises(DirectionError, match=r"but not where in it .*point='resid_pre'"):
        read_directions(path)
    found = read_directions(path, point="resid_post")
    check(found, {(f"blocks.{i}.hook_resid_post", "unknown"): vector(i) for i in (2, 11)})
    one = read_directions(path, site=Site(11, "resid_pre"))
    check(one, {("blocks.11.hook_resid_pre", "unknown"): vector(11)})
    with pytest.raises(DirectionError, match=r"no direction at blocks.5"):
        read_directions(path, site=Site(5, "resid_pre"))
    with pytest.raises(DirectionError, match=r"unknown point 'resid'"):
        read_directions(path, point="resid")  # type: ignore[arg-type]


def test_integer_keys(tmp_path: Path) -> None:
    torch.save({3: vector()}, tmp_path / "v.pt")
    found = read_directions(tmp_path / "v.pt", point="resid_post")
    check(found, {("blocks.3.hook_resid_post", "unknown"): vector()})


def test_no_vector_is_skipped_in_silence(tmp_path: Path) -> None:
    path = save_named(tmp_path / "v.pt", {"blocks.3.hook_resid_pre": vector(), "bias": vector(1)})
    with pytest.raises(DirectionError, match=r"holds 2 tensors, and the names \['bias'\]"):
        read_directions(path, site=PRE)
    torch.save({"blocks.3.hook_resid_pre": vector(), "layer": 10}, path)
    with pytest.raises(DirectionError, match=r"holds a dict of \['Tensor', 'int'\]"):
        read_directions(path)
    torch.save([vector()], path)
    with pytest.raises(DirectionError, match=r"holds a list"):
        read_directions(path, site=PRE)


def test_vectors_of_two_models_in_one_file(tmp_path: Path) -> None:
    path = save_named(tmp_path / "v.pt", {"1.resid_pre": vector(), "2.resid_pre": vector(1, 8)})
    with pytest.raises(DirectionError, match=r"length \[8\], and d_model is 12"):
        read_directions(path)


# --------------------------------------------------------------------------------- pickles and ruins


def test_pickles_are_refused(tmp_path: Path) -> None:
    hit = tmp_path / "hit"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (hit,))

    for file in ("v.pkl", "v.pickle", "v.pt", "v.npy"):
        path = tmp_path / file
        if file == "v.npy":
            np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
        elif file == "v.pt":
            torch.save({"a": Bomb()}, path)
        else:
            path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(DirectionError, match=r"unpickling runs.*convert it once"):
            read_directions(path, site=PRE)
    assert not hit.exists()


def test_the_way_out_of_a_pickle_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Steering(), tmp_path / "v.pt")
    with pytest.raises(DirectionError, match=r"holds more than tensors.*convert it once") as caught:
        read_directions(tmp_path / "v.pt")
    lines = str(caught.value).splitlines()
    snippet = [line[4:] for line in lines if line.startswith("    ")]
    assert len(snippet) == 3
    monkeypatch.chdir(tmp_path)
    exec("\n".join(snippet), {})
    found = read_directions(tmp_path / "v.safetensors")
    check(found, {("blocks.3.hook_resid_post", "unknown"): vector()})


@pytest.mark.parametrize("file", ("v.pt", "v.npy", "v.safetensors", "v.gguf", "mean_diffs.pt"))
def test_truncated_files(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    if file == "v.gguf":
        write_control_vector(path, {1: vector(), 2: vector(1)})
    else:
        save(path, vector() if file[0] == "v" else torch.randn(2, 2, 3))
    whole = path.read_bytes()
    cuts = {0, 1, 10, 60, len(whole) // 2, len(whole) - 1}
    if file == "v.gguf":
        cuts |= set(range(0, len(whole) - 40, 7))  # the end is padding
        cuts -= {len(whole) - 1}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(DirectionError, match=file):
            read_directions(path, site=PRE)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(DirectionError, match=file):
        read_directions(path, site=PRE)


def test_unknown_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DirectionError, match=r"ending '.txt': accepted are .pt, .pth, .npy"):
        read_directions(tmp_path / "v.txt")
    for file in ("v.pt", "v.npy", "v.safetensors", "v.gguf"):
        with pytest.raises(DirectionError, match=r"cannot read .*(No such file|no file)"):
            read_directions(tmp_path / file, site=PRE)


# --------------------------------------------------------------------------------- control vectors


def write_control_vector(
    path: Path,
    vectors: dict[int, Tensor],
    *,
    arch: str = "controlvector",
    name: str = "direction.{}",
) -> Path:
    """As repeng and llama.cpp's generator write one."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, tensor in vectors.items():
        writer.add_tensor(name.format(layer), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_control_vector(tmp_path: Path) -> None:
    # repeng: the last block first, block 0 not there
    path = write_control_vector(tmp_path / "v.gguf", {i: vector(i) for i in (11, 10, 2, 1)})
    found = read_directions(path)
    want = {(f"blocks.{i}.hook_resid_post", "unknown"): vector(i) for i in (1, 2, 10, 11)}
    check(found, want)
    assert [d.site.layer for d in found] == [1, 2, 10, 11]
    assert {d.method for d in found} == {"control_vector"} and "made for llama" in found.source
    one = read_directions(path, site=Site(10, "resid_post"), position="-1")
    check(one, {("blocks.10.hook_resid_post", "-1"): vector(10)})
    with pytest.raises(DirectionError, match=r"no direction at blocks.10.hook_resid_pre"):
        read_directions(path, site=Site(10, "resid_pre"))


def test_control_vector_with_layers_left_alone(tmp_path: Path) -> None:
    path = write_control_vector(tmp_path / "v.gguf", {1: torch.zeros(D_MODEL), 2: vector()})
    found = read_directions(path)
    check(found, {("blocks.2.hook_resid_post", "unknown"): vector()})
    assert list(found.left_out) == ["blocks.1.hook_resid_post[unknown]"]


def test_gguf_that_is_no_control_vector(tmp_path: Path) -> None:
    for options, message in (
        ({"arch": "llama"}, r"holds a 'llama', not a control vector"),
        ({"name": "blk.{}.weight"}, r"has a tensor 'blk.1.weight', where direction.N is expected"),
        ({"name": "direction.-{}"}, r"where direction.N is expected"),
    ):
        path = write_control_vector(tmp_path / "v.gguf", {1: vector()}, **options)
        with pytest.raises(DirectionError, match=message):
            read_directions(path)
    for other in (torch.arange(D_MODEL).int(), vector().half()):  # llama.cpp refuses them
        path = write_control_vector(tmp_path / "v.gguf", {1: other})
        with pytest.raises(DirectionError, match=r"wanted float32"):
            read_directions(path)
    with pytest.raises(DirectionError, match=r"no vector"):
        read_directions(write_control_vector(tmp_path / "v.gguf", {}))


# --------------------------------------------------------------------------------- out again


def some() -> list[Direction]:
    make = Direction
    return [
        make(
            vector(0), 4.25, POST, "-1", "difference_in_means", Separation(0.9, 2.5), source="here"
        ),
        make(vector(1), 1e-3, PRE, "mean", "random"),
        make(vector(2), 7.0, Site(0, "embed"), "-2", "pca"),
    ]


def same(found: Directions, wanted: list[Direction]) -> None:
    assert [d.fingerprint for d in found] == [d.fingerprint for d in wanted]
    assert [d.separation for d in found] == [d.separation for d in wanted]
    assert [d.source for d in found] == [d.source for d in wanted]


def test_written_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "v.safetensors"
    write_directions(some(), path)
    same(read_directions(path), some())
    plain = load_file(path)  # what any other tool does
    assert set(plain) == {"blocks.3.hook_resid_post", "blocks.3.hook_resid_pre", "hook_embed"}
    assert torch.equal(plain["hook_embed"], some()[2].vector)
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]
    read = read_directions(path, site=PRE)
    same(read, some()[1:2])


def test_written_raw_and_in_float32(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_directions(some(), path, dtype="float32", raw=True)
    plain = load_file(path)
    for item, found in zip(some(), read_directions(path)):
        tensor = plain[str(item.site)]
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), item.raw, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found.vector, item.vector, rtol=1e-6, atol=1e-7)
        assert found.norm == item.norm and found.name == item.name
    write_directions(some(), path, raw=True)
    for item, found in zip(some(), read_directions(path)):
        torch.testing.assert_close(found.raw, item.raw, rtol=1e-12, atol=1e-12)
    write_directions(some(), path, dtype="float32")
    assert float(load_file(path)["hook_embed"].norm()) == pytest.approx(1, abs=1e-6)
    assert read_directions(path).items[2].norm == 7.0


def test_several_directions_at_one_site(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    two = [Direction(vector(i), 1.0, PRE, place) for i, place in enumerate(("-1", "-2"))]
    write_directions(two, path)
    assert set(load_file(path)) == {f"blocks.3.hook_resid_pre[{place}]" for place in ("-1", "-2")}
    same(read_directions(path), two)
    same(read_directions(path, position="-2"), two[1:])
    three = [*two, Direction(vector(5), 1.0, PRE, "-1", "pca")]
    write_directions(three, path)
    assert "pca@blocks.3.hook_resid_pre[-1]" in load_file(path)
    same(read_directions(path), three)
    # without our metadata, the names still say it
    save_file(load_file(path), path)
    assert {d.name for d in read_directions(path)} == {d.name for d in three}
    with pytest.raises(DirectionError, match=r"have one name: \['pca@"):
        write_directions([*three, three[2]], path)


def test_a_directions_file_of_a_run(tmp_path: Path) -> None:
    Directions(tuple(some())).save(tmp_path / "directions.safetensors")
    same(read_directions(tmp_path / "directions.safetensors"), some())
    same(read_directions(tmp_path / "directions.safetensors", site=PRE), some()[1:2])


def test_what_is_not_written(tmp_path: Path) -> None:
    for items, file, options in (
        ([], "v.safetensors", {}),
        (some(), "v.pt", {}),
        (some(), "v.safetensors", {"dtype": "float16"}),
    ):
        with pytest.raises(DirectionError, match=r"cannot write .* directions in float"):
            write_directions(items, tmp_path / file, **options)
    (tmp_path / "file").touch()
    with pytest.raises(DirectionError, match=r"cannot write .*v.safetensors"):
        write_directions(some(), tmp_path / "file" / "v.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "change",
    (
        lambda about: about["directions"].pop("hook_embed"),
        lambda about: about["directions"]["hook_embed"].pop("norm"),
        lambda about: about["directions"]["hook_embed"].update(norm=-1.0),
        lambda about: about["directions"]["hook_embed"].update(site="nowhere"),
        lambda about: about.update(directions=None),
        lambda about: about.pop("raw"),
        lambda about: about["directions"][str(POST)].pop("d_prime"),
    ),
)
def test_metadata_that_lie(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "v.safetensors"
    write_directions(some(), path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["interp_ablate"])
    change(about)
    save_file(load_file(path), path, metadata={"interp_ablate": json.dumps(about)})
    with pytest.raises(DirectionError, match=r"metadata of .*v.safetensors do not describe"):
        read_directions(path)

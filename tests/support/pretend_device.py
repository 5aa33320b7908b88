"""A second device on a machine that has none: tensors that compute on the CPU and behave as if they were elsewhere.

`torch.device("pretend:0")`, `"pretend:1"`: factories, `.to`, modules, autograd, generation of transformers and scaled dot product
attention work. As on CUDA, an operation that mixes a pretend tensor with a CPU tensor of one axis or more raises, two pretend
devices do not mix, indexing by a CPU index is allowed, and `.numpy()` raises until `.cpu()`. Slow; for tiny models.

    import pretend_device
    with pretend_device.on():
        model.to("pretend:0")

Experimental hooks of torch are used (`torch.utils.backend_registration`): for tests only, on tiny models.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "pretend"
HAS_FLOAT64 = True
"""As CUDA has it; False: as on MPS, nothing on the device is float64."""
aten = torch.ops.aten
_MOVES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
_INDEXING = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten.index_put_.default,
    aten._index_put_impl_.default,
}  # fmt: skip


WAITS: Counter[str] = Counter()
"""How often the CPU waited for a device, by what it asked for: numbers, copies, the places of a mask."""


def _count_waits(func: Any, args: Any, target: torch.device) -> None:
    arrives = target.type == "cpu" and (func is aten._to_copy.default or func is aten.copy_.default)
    if arrives or func in (aten._local_scalar_dense.default, aten.nonzero.default):
        WAITS[str(func)] += 1
    if func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1]):
        WAITS["a mask as an index"] += 1


class Watch:
    """Counts the tensors of a shape that live on pretend devices at once, each memory once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.most = torch.Size(shape), 0
        self._seen: list[weakref.ref[Elsewhere]] = []

    def see(self, tensor: Elsewhere) -> None:
        if (
            tensor.shape == self.shape and tensor.inner.is_contiguous()
        ):  # no transposed view of another
            self._seen.append(weakref.ref(tensor))
            self.most = max(self.most, self.now)

    @property
    def now(self) -> int:
        self._seen = [ref for ref in self._seen if ref() is not None]
        living = [ref() for ref in self._seen]
        return len({t.inner.untyped_storage().data_ptr() for t in living if t is not None})


WATCHES: list[Watch] = []


@contextmanager
def watching(shape: tuple[int, ...]) -> Iterator[Watch]:
    """`most` of what is returned is the largest number of tensors of a shape that lived at once."""
    watch = Watch(shape)
    WATCHES.append(watch)
    try:
        yield watch
    finally:
        WATCHES.remove(watch)


class Elsewhere(torch.Tensor):
    """A CPU tensor (`inner`) that says it is on a pretend device."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: Any) -> Elsewhere:
        found = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=torch.device(device),
        )  # fmt: skip
        found.inner = inner
        for watch in WATCHES:
            watch.see(found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied: Any = Elsewhere(self.inner.clone(), self.device)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r}, device={str(self.device)!r})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first."
        )

    __array__ = numpy

    def tolist(self) -> Any:
        WAITS["tolist"] += 1
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()  # accelerate and safetensors tell tied weights by it

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Any) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def storage(self) -> Any:
        return self.inner.storage()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Elsewhere, (self.inner, str(self.device))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, Elsewhere)]
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Elsewhere)]
    device = kwargs.get("device")
    target = (
        torch.device(device)
        if device is not None
        else there[0].device
        if there
        else torch.device("cpu")
    )
    if func in _MOVES:
        if func is not aten._to_copy.default:
            target = args[0].device
    else:
        devices = {t.device for t in there}
        mixed = [t for t in here if t.dim() > 0]
        if len(devices) > 1 or (there and mixed and func not in _INDEXING):
            found = sorted({str(t.device) for t in [*there, *mixed]})
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {found}")
    plain = [t.inner if isinstance(t, Elsewhere) else t for t in flat]
    if there:
        _count_waits(func, args, target)
    a, k = tree_unflatten(plain, spec)
    if "device" in k:
        k = {**k, "device": torch.device("cpu")}
    if k.get("pin_memory"):
        k = {**k, "pin_memory": False}
    out = func(*a, **k)
    if func is aten._local_scalar_dense.default or target.type != KIND:
        return out
    known = {id(t.inner): t for t in there}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64 and not HAS_FLOAT64:
            raise TypeError(f"{func}: {target} has no float64 (nor has MPS): move to the CPU first")
        return known[id(value)] if id(value) in known else Elsewhere(value, target)

    return tree_map(wrapped, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        device = kwargs.get("device")
        wanted = device is not None and torch.device(device).type == KIND
        if wanted or any(isinstance(t, Elsewhere) for t in flat):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


_setup_privateuseone_for_python_backend(KIND)
_libraries = [torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")]
_libraries[0].impl(
    "_fused_sdp_choice", lambda *args, **kwargs: 0, "PrivateUse1"
)  # attention as a composite
_libraries[1].fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):  # type: ignore[no-untyped-def]
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype), device or f"{KIND}:0")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):  # type: ignore[no-untyped-def]
    return Elsewhere(torch.empty(size, dtype=dtype), device or f"{KIND}:0")


def _copy_from(source, target, non_blocking=False):  # type: ignore[no-untyped-def]
    WAITS["copy"] += isinstance(source, Elsewhere) and not isinstance(target, Elsewhere)
    inner = [t.inner if isinstance(t, Elsewhere) else t for t in (source, target)]
    inner[1].copy_(inner[0])
    return target


for _name, _function in (
    ("empty_strided", _empty_strided),
    ("empty.memory_format", _empty),
    ("_copy_from", _copy_from),
):
    _libraries[0].impl(_name, _function, "PrivateUse1")

_Generator = torch.Generator


class _CpuGenerator(_Generator):
    """`torch.Generator(device)`: a pretend device draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator("cpu" if torch.device(device).type == KIND else device)


def _two_devices(model: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Memory for three quarters of a model on one device, and for all of it on another: the blocks are on both."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {f"{KIND}:0": int(0.75 * size), f"{KIND}:1": 2 * size}


@contextmanager
def on() -> Iterator[None]:
    """Pretend tensors can be made by factories and used inside; `device_map="auto"` finds two devices."""
    from transformers.integrations import accelerate

    here = {"get_balanced_memory": _two_devices, "get_max_memory": lambda memory=None: memory}
    theirs = {name: getattr(accelerate, name) for name in here}
    torch.Generator = _CpuGenerator  # type: ignore[misc]
    try:
        vars(accelerate).update(here)
        with _Mode():
            yield
    finally:
        torch.Generator = _Generator  # type: ignore[misc]
        vars(accelerate).update(theirs)

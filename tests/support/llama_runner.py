"""Runs llama.cpp for the tests, in an environment of its own (llama-cpp-python and numpy only).

    python llama_runner.py < job.json > result.json

A job: {"model": GGUF, "out": FILE.npz, "texts": [text, ...], "runs": [{"name", "rows": [[token, ...], ...],
"max_new_tokens": 0, "control_vector": GGUF or null, "scale": 1.0, "lora": GGUF or null}, ...]}. Logits of every position of every row
go to FILE.npz as "<run>/<row number>"; the result holds the texts' tokens, with what the model adds, and
every run's greedy continuations up to an end token.

The control vector goes through llama.cpp's own loader, `common_control_vector_load`, which is C++: a few
lines are compiled against the installed libllama-common (the environment has a compiler, it built llama.cpp).
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np

# As llama.cpp's common/common.h declares them; the header itself is not installed.
BRIDGE = r"""
#include <cstring>
#include <string>
#include <vector>
struct common_control_vector_data { int n_embd; std::vector<float> data; };
struct common_control_vector_load_info { float strength; std::string fname; };
common_control_vector_data common_control_vector_load(const std::vector<common_control_vector_load_info> &);
extern "C" int read_vector(const char * file, float scale, float * out, size_t room, size_t * size) {
    auto loaded = common_control_vector_load({{scale, file}});
    *size = loaded.data.size();
    if (*size <= room) { std::memcpy(out, loaded.data.data(), *size * sizeof(float)); }
    return loaded.n_embd;
}
"""


@cache
def loader() -> ctypes.CDLL:
    """llama.cpp's control vector loader, compiled into a library that lives as long as this process."""
    libraries = Path(sysconfig.get_paths()["platlib"]) / "lib"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "bridge.cpp", Path(folder) / "bridge.so"
        source.write_text(BRIDGE)
        # fmt: off
        subprocess.run(
            ["g++", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), f"-L{libraries}",
             "-l:libllama-common.so.0", f"-Wl,-rpath,{libraries}"],
            check=True,
        )
        # fmt: on
        return ctypes.CDLL(str(library))


def control_vector(path: str, scale: float, room: int) -> tuple[np.ndarray, int]:
    """The vectors of blocks 1, 2, ... one after the other, and their length, as llama.cpp reads them."""
    out, size = np.zeros(room, np.float32), ctypes.c_size_t()
    pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    read = loader().read_vector
    # fmt: off
    read.argtypes = [ctypes.c_char_p, ctypes.c_float, ctypes.POINTER(ctypes.c_float), ctypes.c_size_t,
                     ctypes.POINTER(ctypes.c_size_t)]
    # fmt: on
    width = read(path.encode(), scale, pointer, room, ctypes.byref(size))
    if width < 1 or size.value > room:
        raise SystemExit(f"llama.cpp refused the control vector {path}")
    return out[: size.value], width


def load(model: str, lora: str | None = None) -> llama_cpp.Llama:
    """The model with float32 keys and values: the file's own precision is what is compared."""
    return llama_cpp.Llama(
        model,
        n_ctx=512,
        n_threads=1,  # threads that wait for one another lose more than they win here
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        lora_path=lora,
    )


def apply(llama: llama_cpp.Llama, path: str, scale: float) -> None:
    """The steps of llama.cpp's tools for `--control-vector-scaled path:scale`."""
    layers = llama_cpp.llama_model_n_layer(llama.model)
    values, width = control_vector(path, scale, layers * llama.n_embd())
    pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(llama.ctx, pointer, values.size, width, 1, layers):
        raise SystemExit(f"llama.cpp cannot apply the control vector {path} to this model")


def continued(llama: llama_cpp.Llama, row: list[int], n: int) -> tuple[np.ndarray, list[int]]:
    """Logits [pos, d_vocab] of a row, and its greedy continuation of at most n tokens."""
    llama.reset()
    llama.eval(row)
    logits, found = llama.scores[: len(row)].copy(), []
    while len(found) < n:
        token = int(llama.scores[llama.n_tokens - 1].argmax())
        if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(llama.model), token):
            break
        found.append(token)
        llama.eval([token])
    return logits, found


def main() -> None:
    job = json.load(sys.stdin)
    arrays: dict[str, np.ndarray] = {}
    result: dict = {"version": llama_cpp.__version__, "runs": {}}
    for run in job.get("runs", []):
        llama = load(
            job["model"], run.get("lora")
        )  # anew: vectors of an earlier run stay in a context
        if run.get("control_vector"):
            apply(llama, run["control_vector"], run.get("scale", 1.0))
        rows = [continued(llama, row, run.get("max_new_tokens", 0)) for row in run["rows"]]
        arrays.update({f"{run['name']}/{i}": logits for i, (logits, _) in enumerate(rows)})
        result["runs"][run["name"]] = [found for _, found in rows]
        llama.close()
    if job.get("texts"):
        llama = load(job["model"])
        result["texts"] = [
            llama.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]
        ]
    if job.get("out"):
        np.savez(job["out"], **arrays)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()

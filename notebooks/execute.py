"""Executes the notebooks in place, outputs included; exits 1 at the first cell that fails.

`python notebooks/execute.py [NAME ...]`; INTERP_ABLATE_SMALL=1 makes the notebooks run at a small size.
`--check` executes without writing the result back. What notebooks leave in the temporary folder is removed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as place:
        os.environ["TMPDIR"] = place  # kernels inherit it; a killed one cleans nothing up
        return execute(arguments)


def execute(arguments: list[str]) -> int:
    check = "--check" in arguments
    names = [name for name in arguments if not name.startswith("--")]
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.name not in names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": HERE}})
        try:
            client.execute()
        except CellExecutionError as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        for cell in notebook.cells:  # warnings of the machine that executed it are not results
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        if not check:
            nbformat.write(notebook, path)
        print(f"{path.name}: executed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

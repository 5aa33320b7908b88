"""What MkDocs asks for while it builds: a reference page a wing, made from the source text.

Knows: MkDocs' events. Does not know: what any wing does; that is in its docstrings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import generated


def on_files(files: Files, config: Any) -> Files:
    """Add the reference pages, which are in no folder."""
    pages = {f"api/{wing}.md": _wing_page(wing) for wing in generated.wings()}
    pages["api/ground.md"] = "\n\n".join(
        ["# sites and errors", "::: interp_ablate.sites", "::: interp_ablate.errors"]
    )
    pages["api/index.md"] = _index()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def _wing_page(wing: str) -> str:
    door = generated.PACKAGE / wing / "__init__.py"
    modules = [_module(path) for path in generated.python_files(wing)]
    head = [f"# {wing}", generated.docstring(door), generated.files_table(wing)]
    return "\n\n".join(head + [f"::: {module}" for module in modules])


def _module(path: Path) -> str:
    return ".".join(path.relative_to(generated.ROOT).with_suffix("").parts)


def _index() -> str:
    rows = [
        f"| [{wing}]({wing}.md) | {generated.summary(generated.PACKAGE / wing / '__init__.py')} |"
        for wing in generated.wings()
    ]
    return "\n".join(
        [
            "# API reference",
            "",
            "One page a wing, made from the source. `import interp_ablate` gives the names of the core path.",
            "Everything else comes through a wing's door, such as `from interp_ablate.export import export_lora`.",
            "",
            "| wing | what it is for |",
            "|---|---|",
            *rows,
            "| [sites and errors](ground.md) | Places of the residual stream, and the errors raised on purpose. |",
            "",
        ]
    )

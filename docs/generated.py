"""The parts of the documentation that are made from the code.

`python docs/generated.py` writes them into the pages, between a pair of comments; a test holds the pages to
what this file would write. The site's hooks make the API pages from the same functions.

Knows: file docstrings, the table of architectures, the outcomes of `make families`, the comments that mark a
generated part.
Does not know: MkDocs, or any model.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "interp_ablate"

STOREYS = {
    "Ground": ("storage", "jobs", "stats"),
    "Text": ("prompts",),
    "Mathematics": ("directions", "scoring", "edits"),
    "Core path": ("models", "activations", "evaluation", "weights", "search", "export", "circuits"),
    "Applications": ("persona", "datasets", "training"),
    "Faces": ("plots", "budget", "runs", "league", "explorer", "cli"),
}
"""The wings by storey, from the ground up."""


def wings() -> list[str]:
    """The names of the package's wings, lowest first."""
    return [wing for names in STOREYS.values() for wing in names]


def docstring(path: Path) -> str:
    """The docstring of a Python file, read without importing it."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def summary(path: Path) -> str:
    """The first paragraph of a file's docstring, on one line."""
    return " ".join(docstring(path).split("\n\n")[0].split())


def python_files(wing: str) -> list[Path]:
    """The Python files of a wing, doors left out, in the order of their paths."""
    files = sorted((PACKAGE / wing).rglob("*.py"))
    return [path for path in files if path.name != "__init__.py"]


def files_table(wing: str) -> str:
    """A Markdown table of a wing's files, each with the first paragraph of its docstring."""
    rows = [
        f"| `{path.relative_to(PACKAGE / wing)}` | {_cell(summary(path))} |"
        for path in python_files(wing)
    ]
    return "\n".join(["| file | what is in it |", "|---|---|", *rows])


def files() -> str:
    """Every file of the package with its line, a section a storey, a table a wing."""
    tops = [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]
    parts = ["### The package itself", ""]
    parts += ["| file | what is in it |", "|---|---|"]
    parts += [
        f"| `{path.name}` | {_cell(summary(path))} |" for path in [PACKAGE / "__init__.py", *tops]
    ]
    for storey, names in STOREYS.items():
        for wing in names:
            parts += ["", f"### {wing}/ ({storey.lower()})", ""]
            parts += [docstring(PACKAGE / wing / "__init__.py"), "", files_table(wing)]
    return "\n".join(parts)


def architectures() -> str:
    """The table of declared architectures, as `interp-ablate models` has it."""
    from interp_ablate.models.architectures import table

    rows = list(table())
    heads = {
        "model_type": "model type",
        "families": "families",
        "attention": "attention writes with",
        "mlp": "the MLP writes with",
        "norm_after": "norm after them",
    }
    lines = ["| " + " | ".join(heads.values()) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = (
            row[name] if name in ("model_type", "families") else _code(row[name]) for name in heads
        )
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def outcomes() -> dict[str, Any]:
    """What `make families` measured last: docs/families.json."""
    table: dict[str, Any] = json.loads((ROOT / "docs/families.json").read_text(encoding="utf-8"))
    return table


def exact_families() -> str:
    """The types whose exports are exact: the class, what it runs on, and what was proven to write."""
    table = outcomes()
    lines = [
        f"Measured with transformers {table['transformers']}.",
        "",
        "| model type | class | runs on | checked | attention writes with | the MLP writes with |",
        "|" + "---|" * 6,
    ]
    for name, forms in table["outcomes"].items():
        first = next(iter(forms.values()))
        if first["outcome"] != "exact":
            continue
        exact = [form for form, each in forms.items() if each["outcome"] == "exact"]
        cells = [name, first["model_class"], first["backend"], ", ".join(exact)]
        for part in ("attn", "mlp"):
            written = first["writes"].get(f"{part}_out") or first["writes"].get(f"{part}_proj")
            cells.append(_code("; ".join(written or ["nothing"])))
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def other_families() -> str:
    """The other types, each with what was found."""
    lines = ["| model type | outcome | what was found |", "|---|---|---|"]
    for name, forms in outcomes()["outcomes"].items():
        for form, each in forms.items():
            if each["outcome"] == "exact":
                continue
            where = name if form == next(iter(forms)) else f"{name}, {form}"
            said = each["detail"].split(": ", 2)[-1].replace("<", "&lt;")
            cut = said if len(said) <= 240 else f"{said[:240]} …"
            lines.append(f"| {where} | {each['outcome']} | {_cell(cut)} |")
    return "\n".join(lines)


PARTS = {
    "architecture.md": {"files": files},
    "export.md": {"architectures": architectures},
    "families.md": {"exact": exact_families, "others": other_families},
}
"""The generated parts of each page, by the name in its comments."""


def with_parts(name: str) -> str:
    """The text of a page with its generated parts made anew.

    Raises:
        ValueError: the page lacks the comments that mark a part.
    """
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for part, make in PARTS[name].items():
        start, end = f"<!-- generated: {part} -->", f"<!-- end of {part} -->"
        if start not in text or end not in text:
            raise ValueError(f"docs/{name} lacks the comments {start} and {end}")
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n\n{make()}\n\n{end}{after}"
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """Names of tensors as code, within their layer and without `.weight`; plain words as they are."""
    short = re.sub(r"\b[\w.]+\.\{layer\}\.|\.weight\b", "", text)
    return re.sub(r"[\w.{}]*[._{][\w.{}]*[\w}]", lambda match: f"`{match.group()}`", short)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for page in PARTS:
        (ROOT / "docs" / page).write_text(with_parts(page), encoding="utf-8")

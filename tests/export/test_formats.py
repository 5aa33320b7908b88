"""The table of export formats: names, and one that another package registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from interp_ablate.errors import ExportError
from interp_ablate.export.formats import ExportRequest, format_named


def test_a_format_of_another_package(tmp_path, monkeypatch):
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[interp_ablate.export_formats]\nlines = outside_formats:LINES\n"
    )
    (tmp_path / "outside_formats.py").write_text(
        "from interp_ablate.export import ExportFormat\n"
        "def write(request):\n"
        "    request.out.write_text(str(len(request.plan)))\n"
        "    return {'edits': len(request.plan)}\n"
        "LINES = ExportFormat(write, 'plan.txt')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    lines = format_named("lines")
    assert (lines.default_out, lines.needs_plan, lines.adds) == ("plan.txt", True, False)
    request = ExportRequest((1, 2), tmp_path / "plan.txt", lambda: None)
    assert lines.export(request) == {"edits": 2}
    assert Path(tmp_path / "plan.txt").read_text() == "2"
    with pytest.raises(ExportError, match=r"'onnx': accepted are checkpoint, .*, lines"):
        format_named("onnx")

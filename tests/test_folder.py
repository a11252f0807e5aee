"""Lines of a run's folder are read back as they were written, whatever text they hold."""

from __future__ import annotations

from pathlib import Path

from fedsim.folder import RunFolder

# What str.splitlines takes for the end of a line.
ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_lines_survive_every_line_separator(tmp_path: Path) -> None:
    lines = [{"prompt": f"before{end}after{end}", "n": n} for n, end in enumerate(ENDS)]
    folder = RunFolder(tmp_path)
    folder.append("eval/task.jsonl", lines[:4])
    folder.append("eval/task.jsonl", lines[4:])
    assert folder.read("eval/task.jsonl") == lines
    assert folder.read("nothing.jsonl") == []

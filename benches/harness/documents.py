"""Documents with sections that scripts write."""

from __future__ import annotations

from pathlib import Path


def replace_section(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the comments `name: begin` and `name: end` in a Markdown document."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise RuntimeError(f"{path} has no {begin.strip()} with {end} after it")
    path.write_text(f"{before}{begin}{text}\n{end}{after}")

"""Documents with sections that scripts write."""

from __future__ import annotations

from pathlib import Path


def replace_section(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the comments `name: begin` and `name: end` in a Markdown document."""
    before, after = around_section(path, name)
    path.write_text(f"{before}{text}\n{after}")


def around_section(path: Path, name: str) -> tuple[str, str]:
    """What stands before and after such a section, comments included. Who measures for minutes asks first whether it exists."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    try:
        document = path.read_text()
    except OSError as error:
        raise SystemExit(f"{path} cannot be read: {error.strerror}") from error
    before, _, rest = document.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no {begin.strip()} with {end} after it")
    return before + begin, end + after

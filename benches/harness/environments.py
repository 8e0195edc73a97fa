"""Virtual environments with pinned packages, made when they are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def python_of(directory: Path, requirements: Path) -> Path:
    """The interpreter of the environment in `directory`, which is made with `requirements` if it is not there."""
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"making {directory} from {requirements.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--requirement", str(requirements)], check=True)
    return python

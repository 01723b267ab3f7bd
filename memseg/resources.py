"""Where the shipped profiles and recipes lie: inside the wheel, or at the top of a source checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder `profiles` or `recipes` that came with this memseg."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name

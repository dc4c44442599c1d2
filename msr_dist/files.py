"""Files that are whole or absent."""

from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write `text` under another name, then rename: whoever reads `file` finds the old text or the new."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)

"""Generated parts of a Markdown file, between two comment lines."""

from pathlib import Path


def replace_between(path: Path, name: str, text: str) -> bool:
    """Puts `text` between `<!-- name:begin -->` and `<!-- name:end -->` in `path`; everything else stays as it is.

    Returns:
        False, with a printed line, if the file or its markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, found_begin, rest = old.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        print(f"{path}: expected the lines {begin} and {end}")
        return False
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    return True

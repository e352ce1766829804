"""Generated parts of a Markdown or Python file, between two comment lines."""

from pathlib import Path

from .provenance import ROOT

NOTES = ROOT / "benchmarks" / "NOTES.md"


def replace_between(path: Path, name: str, text: str) -> bool:
    """Puts `text` between the comment lines `name:begin` and `name:end` of `path`; everything else stays as it is.

    A comment is `<!-- name:begin -->`, in a `.py` file `# name:begin`.

    Returns:
        False, with a printed line, if the file or its markers are missing.
    """
    left, right = ("# ", "") if path.suffix == ".py" else ("<!-- ", " -->")
    begin, end = f"{left}{name}:begin{right}", f"{left}{name}:end{right}"
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, found_begin, rest = old.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not found_begin or not found_end:
        print(f"{path}: expected the lines {begin} and {end}")
        return False
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    return True

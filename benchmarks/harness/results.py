"""Results files: one JSON per suite and device, with where the numbers come from."""

import dataclasses
import json
import math
from pathlib import Path

from .ceilings import Ceilings


def suite_record(suite: str, provenance: dict, command: list[str], ceilings: Ceilings | None) -> dict:
    """An empty record of one run; `rows` and `not_measured` are appended to."""
    return {
        "suite": suite,
        "provenance": provenance,
        "command": command,
        "ceilings": None if ceilings is None else dataclasses.asdict(ceilings),
        "rows": [],
        "not_measured": [],
    }


def _plain(value):
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def save(record: dict, folder: Path) -> Path:
    """Writes `folder`/<suite>.json, one row a line, replacing what was there only when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in record["rows"]]
    head = {key: value for key, value in record.items() if key != "rows"}
    text = json.dumps(_plain(head), indent=1, allow_nan=False)[:-2]
    lines = ",\n".join("  " + json.dumps(_plain(row), allow_nan=False) for row in rows)
    path, partial = folder / f"{record['suite']}.json", folder / f".{record['suite']}.json.partial"
    partial.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    partial.replace(path)
    return path


def load_record(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load(results: Path) -> list[dict]:
    """Every suite's record under `results`/<device>/, in the order of their paths; studies keep other files there."""
    records = [load_record(path) for path in sorted(results.glob("*/*.json"))]
    return [record for record in records if "suite" in record]

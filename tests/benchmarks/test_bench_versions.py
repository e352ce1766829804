"""`benchmarks.studies.versions`: a version beside an earlier one, each in its own process."""

import json
from pathlib import Path

import pytest

from detr_fast.benchmarks import report
from detr_fast.benchmarks.studies import versions

ROOT = Path(__file__).resolve().parents[2]
CASE = "train tiny, no padding"


def test_a_version_is_as_fast_as_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(versions, "_tree_of", lambda commit, root, target: (target / "root").symlink_to(root) or commit)
    compare = versions.compare
    monkeypatch.setattr(versions, "compare", lambda case, before, *rest: compare(case, before / "root", *rest))
    assert versions.main(["HEAD", "--case", CASE, "--seconds", "0", "--rounds", "2", "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "versions.json").read_text())["rows"]
    assert row["rounds"] == 2 and row["difference"] == 0 and 0.2 < row["ratio"] < 5
    assert f"| {CASE} | " in capsys.readouterr().out
    (tmp_path / "some").mkdir()
    (tmp_path / "versions.json").rename(tmp_path / "some" / "versions.json")
    assert f"| {CASE} | {row['before_ms']:.1f} | {row['now_ms']:.1f} | {row['ratio']:.2f} |" in report.versions(
        tmp_path
    )


def test_a_version_that_computes_something_else_is_not_timed(monkeypatch):
    class Other:
        def __init__(self, tree, case):
            self.result = {"before": 1.0, "now": 1.01}[tree.name]

        def close(self):
            pass

    monkeypatch.setattr(versions, "_Version", Other)
    with pytest.raises(RuntimeError, match=r"the result is 1\.01, in the earlier version 1\.0"):
        versions.compare(CASE, Path("before"), Path("now"), 0, 1)


def test_an_unknown_commit_and_another_package_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no tree of 'nosuchcommit'"):
        versions.main(["nosuchcommit", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="expected the one in"):
        versions._serve(CASE, str(tmp_path))


def test_a_process_that_ends_is_said(monkeypatch):
    popen = versions.subprocess.Popen
    code = "print(1.0, flush=True)"  # its result, and no time
    monkeypatch.setattr(versions.subprocess, "Popen", lambda command, **more: popen([command[0], "-c", code], **more))
    version = versions._Version(ROOT, CASE)
    version._process.wait()
    with pytest.raises(RuntimeError, match="ended with status 0"):
        version.time()
    version.close()

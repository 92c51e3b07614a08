"""The README's examples run."""
import os
import re

from conftest import ROOT

import data

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()


def test_dataset_in_code(monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    exec(example, {})
    rows = data.load_rows("sums", "train")
    assert len(rows) == 900 and data.grade("number", rows[0]["responses"], rows[0])[1]


def test_jsonl_row(tmp_path, tiny):
    [row] = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my.jsonl").write_text(row * 3)
    rows = data.load_rows("jsonl", "all", str(tmp_path / "my.jsonl"))
    assert len(rows) == 3 and data.grade("number", "The answer is 42.", rows[0])[1]

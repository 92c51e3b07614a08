"""The README's examples run, and its table of keys is the one of --help."""
import dataclasses
import os
import re

from conftest import ROOT

import data
import latro

with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
    README = file.read()


def test_dataset_in_code(monkeypatch):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    exec(example, {})
    rows = data.load_rows("sums", "train")
    assert len(rows) == 900 and data.grade("number", rows[0]["responses"], rows[0])[1]


def test_jsonl_row(tmp_path):
    [row] = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my.jsonl").write_text(row * 3)
    rows = data.load_rows("jsonl", "all", str(tmp_path / "my.jsonl"))
    assert len(rows) == 3 and data.grade("number", "The answer is 42.", rows[0])[1]


def test_every_key_is_there():
    for field in dataclasses.fields(latro.Config):
        default = getattr(latro.Config(), field.name)
        row = f"| `{field.name}` | {'' if default is None else default} | {field.metadata['help']} |"
        assert row.replace("|φ|", r"\|φ\|").replace("π(y|x⊕z)", r"π(y\|x⊕z)") in README

"""The recipes for pictures and folders of one's own, from the files that a person has to scores."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from tests.models.chats import write_chat
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments import recipe, run

COLOURS = ("red", "blue", "green", "white")
FEW = {"batches": 1, "batch_size": 4, "skip": 1}


def written(folder, column):
    """Eight pictures of one colour, in a file of rows."""
    lines = []
    for i in range(8):
        colour = COLOURS[i % 4]
        Image.new("RGB", (24 + 3 * i, 30 - i), colour).save(folder / f"{i}.png")
        said = {"question": "what is in the picture ?", "answer": f"a {colour} dog"}
        lines.append(
            {"image": f"{i}.png", **(said if column == "answer" else {"captions": [f"a {colour} dog", colour]})}
        )
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "column"), [("own/answer", "answer"), ("own/retrieval", "captions")])
def test_every_variant_runs_on_rows_and_a_folder_of_ones_own(name, column, tmp_path):
    rows = written(tmp_path, column)
    backbone = "tiny-clip" if column == "captions" else str(write_chat("smolvlm", tmp_path / "chat"))
    given = [f"backbone.name={backbone}", f"data.train={rows}", f"data.test={rows}", f"data.validation={rows}"]
    for r in recipe.read(name, given):
        methods = tuple({k: FEW.get(k, v) for k, v in m.items()} for m in r.methods)
        small = replace(r.training, steps=min(r.training.steps, 2), batch_size=4, save_every=None)
        folder = run.run(replace(r, methods=methods, training=small), tmp_path / r.variant, measure_costs=False)
        model = folder_of_runs.load(folder)
        row = {"image": Image.new("RGB", (20, 30), "red"), "question": "what is in the picture ?", "captions": ["red"]}
        assert set(model.answer([row])[0]) >= ({"answer"} if column == "answer" else {"image", "text"})

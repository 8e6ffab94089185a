"""Every multimodal family of transformers is built small and run; its row in docs/families.md is what is measured."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.census import made, told, verdict
from tests.models.families import FAMILIES, GROUPS
from tests.models.inputs import inputs
from tests.models.levers import LEVERS, Case
from tests.models.page import page
from tests.models.shrink import build, configs, tiny_config

DOCS = Path(__file__).parent.parent / "docs"
FOUND: dict[str, Any] = json.loads((DOCS / "families.json").read_text())


def tried(family: str) -> str:
    """The lever that is tried here: another one of the next family; `python -m tests.models.census` tries all."""
    return list(LEVERS)[list(FAMILIES).index(family) % len(LEVERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_and_its_row_is_what_is_measured(family: str) -> None:
    torch.set_num_threads(1)
    expected = FOUND[family]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = made(family)
    except Exception as error:
        assert expected["built"], f"it was built before, and now: {told(error)}"
        return
    if "requires the" in expected["built"]:
        pytest.skip("a library is installed here without which the row was written")
    assert not expected["built"], f"it is built now; before: {expected['built']}: run the census again"
    lever = tried(family)
    found, row = verdict(LEVERS[lever], case), expected["levers"][lever]
    assert found.kind == row["kind"], f"{lever}: now {found.kind} ({found.reason}), in docs {row}"


def test_the_page_tells_what_the_census_found() -> None:
    assert set(FOUND) == set(FAMILIES)
    assert (DOCS / "families.md").read_text() == page(FOUND)


@pytest.mark.parametrize("group", ["vision", "text"])
def test_the_page_of_families_that_see_or_read_alone_tells_what_the_census_found(group: str) -> None:
    found = json.loads((DOCS / f"families_{group}.json").read_text())
    assert set(found) == set(GROUPS[group])
    assert (DOCS / f"families_{group}.md").read_text() == page(found, group)
    kinds = {v["kind"] for e in found.values() for v in e["levers"].values()}
    assert kinds == {"works", "refused"}, "a wrong result or an error that no one meant"


def test_few_families_cannot_be_built() -> None:
    missing = {family: entry["built"] for family, entry in FOUND.items() if entry["built"]}
    assert all("requires the" in why and "library" in why for why in missing.values()), missing
    assert len(missing) < 8


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "clip", "t5gemma2", "mllama"])
def test_configurations_are_small_in_all_parts(family: str) -> None:
    model = build(FAMILIES[family], tiny_config(family))
    assert sum(p.numel() for p in model.parameters()) < 500_000
    for config in configs(model.config):
        width, layers = (getattr(config, n, 1) for n in ("hidden_size", "num_hidden_layers"))
        assert width <= 64 and layers <= 6, f"{config.model_type}: {width} wide, {layers} layers"


def test_inputs_have_a_padded_row_and_rows_that_differ() -> None:
    batch = inputs(build("LlavaForConditionalGeneration", tiny_config("llava")))
    assert batch["attention_mask"].bool().all(1).tolist() == [True, False]
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert not torch.equal(batch["input_ids"][0], batch["input_ids"][1])


# --- the checks find what they look for -------------------------------------------------------------------------------


class Mixed(torch.nn.Module):
    """Adds to each row of an output what one of the other rows, or a later token, has."""

    def __init__(self, model: torch.nn.Module, how: str):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, **batch: Any) -> Any:
        out = self.model(**batch)
        logits = out.logits
        other = {"rows": logits.flip(0), "later": logits.flip(1), "words": self.seen(batch["input_ids"])}[self.how]
        return {"logits": logits + other}

    def seen(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().mean(1, keepdim=True)[..., None]


@pytest.fixture(scope="module")
def case() -> Case:
    return made("llava")


@pytest.mark.parametrize(
    ("how", "words"),
    [("rows", "depends on another row"), ("later", "a later word"), ("words", "what stands in padding")],
)
def test_a_model_that_mixes_what_it_must_not_is_found(case: Case, how: str, words: str) -> None:
    facts = case.facts
    assert facts.rows == [0, 1] and facts.causal and facts.padding
    facts.rows = facts.rows if how == "rows" else []
    facts.padding = how == "words"
    try:
        assert words in facts.broken(Mixed(case.fresh(), how).eval(), case.batch, writing=False)
    finally:
        facts.rows, facts.padding = [0, 1], True


def test_an_error_from_elsewhere_is_no_refusal(case: Case) -> None:
    def raises(error: Exception) -> Any:
        def lever(case: Case) -> None:
            raise error

        return lever

    assert verdict(raises(ValueError("from a test")), case).kind == "traceback"
    assert verdict(raises(KeyError("x")), case).kind == "traceback"
    refused = verdict(lambda case: case.adapt(case.fresh()).prune("omp"), case)
    assert refused.kind == "refused" and "sparsity" in refused.reason

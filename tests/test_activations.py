"""Training from the activation cache: the same losses and gradients, resumable, refused when stale."""

from __future__ import annotations

import json

import pytest
import torch

from trimtab.data import draws
from trimtab.data.augment import Augmentation
from trimtab.experiments import assembly, recipe, run, training
from trimtab.experiments import cached as from_table
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.cached import CachedModel, TableCache
from trimtab.methods.tune import cache as stored
from trimtab.methods.tune.cache import pack, unpack

TASKS = {"tiny-clip": "retrieval", "tiny-vilt": "vqa"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 24)
    monkeypatch.setattr(from_table, "RUN_ROWS", 16)


def assembled(tiny_raw, backbone="tiny-clip", task=None, method="unipt", **settings):
    raw = tiny_raw(backbone, task or TASKS[backbone], [{"name": method, **settings}])
    parts = assembly.assemble(recipe.expand(raw, "test")[0])
    parts.attach()
    return parts, parts.source.load(raw["task"] if isinstance(raw["task"], str) else raw["task"]["name"], "train")


def cached(parts, table, folder, *args, **kwargs) -> TableCache:
    cache = TableCache(parts.model, parts.methods[0], table, folder, *args, **kwargs)
    cache.fill()
    return cache


def gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch)["loss"]
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def through_whole(cache, rows) -> dict[str, torch.Tensor]:
    """A batch of the same samples with the same captions, which their places alone tell."""
    placed = [draws.placed(cache.table[i], draws.Place(cache.seed, 0, i)) for i in rows]
    return cache.model.task.collate(cache.model.backbone, placed, True)


@pytest.mark.parametrize("task", ["retrieval", "vqa", "grounding"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-2), ("int8", 0.2)])
def test_losses_and_gradients_are_those_of_the_whole_model(task, precision, tolerance, tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw, "tiny-clip" if task == "retrieval" else "tiny-vilt", task)
    cache = cached(parts, table, tmp_path / "cache", precision)
    rows = [30, 3, 50, 2, 63]  # of several shards, in no order
    batch = cache.batch(rows)
    model = CachedModel(parts.model, parts.methods[0])
    loss, grads = gradients(model, batch)
    same = through_whole(cache, rows)
    if task == "retrieval":  # padding that all have is not handed on
        assert batch["text.map0"].shape[1] == same["attention_mask"].sum(dim=1).max()
    else:
        assert batch["features.mask"].shape[1] >= same["input_ids"].shape[1]
    wanted, exact = gradients(parts.model.eval(), same)
    assert loss == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    assert grads.keys() == exact.keys()
    found, right = (torch.cat([g[n].flatten() for n in exact]) for g in (grads, exact))
    assert torch.nn.functional.cosine_similarity(found, right, dim=0) > 1 - tolerance
    if precision == "fp32":
        assert float((found - right).abs().max()) <= tolerance * float(right.abs().max())


GPO = {"name": "retrieval", "pooling": "gpo", "objective": "triplet", "all_negatives": 9}


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("retrieval", {"towers": ["text"]}),
        (GPO, {"form": "token", "towers": ["text"]}),
        (GPO, {"form": "token"}),
        ("retrieval", {"method": "linear-probe"}),
        (GPO, {"method": "linear-probe"}),
    ],
)
def test_towers_without_a_side_network_hand_on_what_was_cached(task, settings, tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw, "tiny-clip", task, **settings)
    method = None if settings.get("method") else parts.methods[0]
    cache = TableCache(parts.model, method, table, tmp_path / "cache", "fp32", 2)
    cache.fill()
    rows = [30, 3, 50, 2, 63]
    model = CachedModel(parts.model, method)
    found, grads = gradients(model.eval(), cache.batch(rows))
    wanted, exact = gradients(parts.model.eval(), through_whole(cache, rows))
    assert found == pytest.approx(wanted, rel=1e-5) and found > 0
    assert grads.keys() == exact.keys() and grads
    for name, gradient in exact.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-5, rtol=1e-3)
    first, second = cache.batch(rows), cache.batch([64 + r for r in rows])
    vision = next(k for k in first if k.startswith(("vision.map", "features.vision.map")))
    assert torch.equal(first[vision], second[vision])
    assert not torch.equal(first["batch.input_ids"], second["batch.input_ids"])
    later = sorted((tmp_path / "cache").glob("view-1-*"))
    assert later and all(f.stat().st_size < f.with_name(f.name.replace("view-1", "view-0")).stat().st_size
                         for f in later), "what is the same in all views is stored once"  # fmt: skip


def test_no_block_runs_in_training(tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw)
    cache = cached(parts, table, tmp_path / "cache")
    for block in parts.model.backbone.anatomy.blocks():
        parts.plain.get_submodule(block.path).register_forward_hook(lambda *a: pytest.fail("a block ran"))
    model = CachedModel(parts.model, parts.methods[0])
    model(**cache.batch(range(8)))["loss"].backward()
    frozen = {id(p) for n, p in parts.model.named_parameters() if not p.requires_grad and ".unipt." not in n}
    assert not any(id(p) in frozen for p in model.parameters())


def test_an_interrupted_fill_goes_on(tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw)
    first = cached(parts, table, tmp_path / "cache", "fp16", 2)
    files = sorted((tmp_path / "cache").glob("view-*"))
    assert len(files) == 6 and len(first) == 64
    times = {f.name: f.stat().st_mtime_ns for f in files}
    wanted = files[4].read_bytes()
    files[4].unlink()
    again = TableCache(parts.model, parts.methods[0], table, tmp_path / "cache", "fp16", 2)
    assert again.fill() == 1
    assert files[4].read_bytes() == wanted, "what collation draws is the same again"
    assert all(f.stat().st_mtime_ns == times[f.name] for f in files if f != files[4])


def test_views_draw_other_captions(tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw)
    cache = cached(parts, table, tmp_path / "cache", "fp32", 2)
    first, second = cache.batch(range(64)), cache.batch(range(64, 128))
    assert torch.equal(first["vision.map0"], second["vision.map0"])
    assert not torch.equal(first["text.map0"], second["text.map0"])


def test_views_draw_other_crops_and_the_same_captions_as_without(tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw)
    plain = cached(parts, table, tmp_path / "plain", "fp32", 2).batch(range(64))
    cache = cached(parts, table, tmp_path / "cache", "fp32", 2, augmentation=Augmentation(crop=0.5))
    first, second = cache.batch(range(64)), cache.batch(range(64, 128))
    assert not torch.equal(first["vision.map0"], second["vision.map0"])
    assert not torch.equal(first["vision.map0"], plain["vision.map0"])
    assert torch.equal(first["text.map0"], plain["text.map0"])
    with pytest.raises(ValueError, match=r"a cache of another augmentation: Augmentation\(crop=0.5, light=0.0, "):
        cached(parts, table, tmp_path / "cache", "fp32", 2)


def test_a_stale_cache_is_refused(tiny_raw, tmp_path):
    parts, table = assembled(tiny_raw)
    cached(parts, table, tmp_path / "cache")

    def again(parts, table, *args):
        TableCache(parts.model, parts.methods[0], table, tmp_path / "cache", *args)

    again(parts, table)
    for what, args in (("precision", (parts, table, "int8")), ("views", (parts, table, "fp16", 2)),
                       ("rows", (parts, table.select(range(32)))), ("table", (parts, table.select(range(63, -1, -1)))),
                       ("layers", assembled(tiny_raw, layers=[0, 2]))):  # fmt: skip
        with pytest.raises(ValueError, match=f"a cache of another {what}: .*delete the folder"):
            again(*args)
    other, _ = assembled(tiny_raw)
    with torch.no_grad():
        other.plain.text_model.final_layer_norm.weight.add_(1)
    with pytest.raises(ValueError, match="a cache of another backbone"):
        again(other, table)
    with torch.no_grad():
        parts.plain.unipt["text"].up.weight.add_(1)
    again(parts, table)  # training changes side networks, not what they read


def test_what_cannot_be_trained_from_a_cache_says_why(tiny_raw, tmp_path):
    for task, form in (("retrieval", "token"), (GPO, "vector")):
        parts, table = assembled(tiny_raw, task=task, form=form)
        message = f"use UniPT's {'vector' if form == 'token' else 'token'} form"
        with pytest.raises(ValueError, match=message):
            TableCache(parts.model, parts.methods[0], table, tmp_path / "cache")
    parts, table = assembled(tiny_raw)
    parts.plain.visual_projection.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="'model.visual_projection.weight' of the backbone is trained"):
        TableCache(parts.model, parts.methods[0], table, tmp_path / "cache")
    with pytest.raises(recipe.RecipeError, match="only the side networks of `methods:"):
        run.run(recipe.expand(tiny_raw("tiny-clip", "retrieval", ["lora"], cache="fp16"), "test")[0], tmp_path / "run")


def test_a_recipe_augments_with_and_without_a_cache(tiny_raw, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Augmentation, "__call__", lambda self, rows, generator=None: seen.append(self) or rows)
    for cache in (None, "fp16"):
        raw = tiny_raw("tiny-clip", "retrieval", ["unipt"], cache=cache, crop=0.6, light=0.2)
        run.run(recipe.expand(raw, "test")[0], tmp_path / f"run-{cache}", measure_costs=False)
        assert seen and set(seen) == {Augmentation(0.6, 0.2)}
        seen.clear()
    with pytest.raises(recipe.RecipeError, match=r"training: crop must be above 0 and at most 1, found 2"):
        recipe.expand(tiny_raw("tiny-clip", "retrieval", ["unipt"], crop=2.0), "test")


@pytest.mark.parametrize("backbone", TASKS)
def test_a_recipe_trains_from_a_cache(backbone, tiny_raw, tmp_path):
    raw = tiny_raw(backbone, TASKS[backbone], ["unipt"], cache="fp16", head_multiplier=2.0)
    r = recipe.expand(raw, "test")[0]
    folder = run.run(r, tmp_path / "run", measure_costs=False)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["history"]
    parts = folder_of_runs.load_assembly(folder)
    table = parts.source.load(TASKS[backbone], "test")
    assert training.evaluate(parts.model.eval(), table)[0] == metrics["test"]
    fresh = assembly.assemble(r)
    fresh.attach()
    trained = dict(parts.model.named_parameters())
    changed = {n for n, p in fresh.model.named_parameters() if not torch.equal(p, trained[n])}
    assert any(".unipt." in n for n in changed) and any(n.startswith("head.") for n in changed)


def test_int8_maps_are_off_by_half_a_step():
    maps = torch.randn(5, 4, 3) * torch.tensor([0.1, 1.0, 100.0])
    stored = pack("x", maps, "int8")
    assert stored["x"].dtype == torch.int8 and stored["x.scale"].shape == (1, 1, 3)
    error = (unpack(stored, torch.arange(5))["x"] - maps).abs().amax(dim=(0, 1))
    assert (error <= stored["x.scale"][0, 0] * 0.5001).all()


def test_what_half_precision_cannot_hold_is_refused():
    maps = torch.tensor([[[1e5]]])
    with pytest.raises(ValueError, match=r"x has values up to 100000, too large for fp16: use int8 or fp32"):
        pack("x", maps, "fp16")
    assert unpack(pack("x", maps, "int8"), torch.tensor([0]))["x"] == 1e5

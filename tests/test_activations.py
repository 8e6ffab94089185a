"""Training from the activation cache: the same losses and gradients, resumable, refused when stale."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from trimtab.data.augment import Augmentation
from trimtab.data.images import encoded
from trimtab.experiments import assembly, collation, recipe, run, training
from trimtab.experiments import folder as folder_of_runs
from trimtab.experiments.cached import CachedModel, TableCache
from trimtab.methods.tune import cache as stored
from trimtab.methods.tune.cache import Column, pack, unpack

TASKS = {"tiny-clip": "retrieval", "tiny-vilt": "vqa"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(stored, "SHARD_ROWS", 24)
    monkeypatch.setattr(collation, "RUN_ROWS", 8)


def assembled(tiny_raw, backbone="tiny-clip", task=None, method="unipt", **settings):
    raw = tiny_raw(backbone, task or TASKS[backbone], [{"name": method, **settings}])
    parts = assembly.assemble(recipe.expand(raw, "test")[0])
    parts.attach()
    return parts, parts.source.load(raw["task"] if isinstance(raw["task"], str) else raw["task"]["name"], "train")


def cached(parts, table, folder, *args, **kwargs) -> TableCache:
    cache = TableCache(parts.model, parts.methods, table, folder, *args, **kwargs)
    cache.fill()
    return cache


@pytest.fixture(scope="module")
def clip(tiny_raw):
    """A model with side networks that nothing here trains, and its table."""
    return assembled(tiny_raw)


@pytest.fixture(scope="module")
def filled(clip, tmp_path_factory):
    """A filled cache of two views, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "SHARD_ROWS", 24)
        patch.setattr(collation, "RUN_ROWS", 8)
        return cached(*clip, tmp_path_factory.mktemp("filled") / "cache", "fp32", 2)


def names(cache, part: str) -> list[str]:
    return [n for n in cache.columns if part in n]


def test_no_block_runs_in_training(filled, clip):
    parts, _ = clip
    handles = [parts.plain.get_submodule(b.path).register_forward_hook(lambda *a: pytest.fail("a block ran"))
               for b in parts.model.backbone.anatomy.blocks()]  # fmt: skip
    assert filled.held == (12, 12)
    model = CachedModel(filled)
    model(**filled.batch(range(8)))["loss"].backward()
    for handle in handles:
        handle.remove()
    frozen = {id(p) for n, p in parts.model.named_parameters() if not p.requires_grad and ".unipt." not in n}
    assert not any(id(p) in frozen for p in model.parameters())
    trained = {n for n, p in parts.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}, "under the same names"


def test_the_whole_model_is_as_it_was(filled, clip):
    parts, table = clip
    batch = parts.task.collate(parts.model.backbone, [table[i] for i in range(4)], True)
    before = parts.model.eval()(**batch)["loss"]
    model = CachedModel(filled).train()
    assert parts.model.training
    model(**filled.batch([0, 1, 2]))
    assert not any("forward" in vars(m) for m in parts.model.modules())
    assert torch.equal(parts.model.eval()(**batch)["loss"], before)


def test_views_draw_other_captions_and_pictures_are_stored_once(filled):
    first, second = filled.batch(range(64)), filled.batch(range(64, 128))
    (picture,), (words,) = names(filled, "vision:0.map0"), names(filled, "text:0.map0")
    assert torch.equal(first[picture], second[picture])
    assert not torch.equal(first[words], second[words])
    later = sorted(filled.folder.glob("view-1-*"))
    assert len(later) == 3 and all(f.stat().st_size < f.with_name(f.name.replace("view-1", "view-0")).stat().st_size
                                   for f in later)  # fmt: skip
    whole = sum(f.stat().st_size for f in filled.folder.glob("view-*"))
    assert 128 * filled.bytes_a_sample == pytest.approx(whole, rel=0.02), "what is stated is what is written"
    assert f"{whole / 1e6:.0f}" in filled.told() and "all there" in filled.told()


def test_an_interrupted_fill_goes_on(filled, clip, tmp_path):
    shutil.copytree(filled.folder, tmp_path / "cache")
    files = sorted((tmp_path / "cache").glob("view-*"))
    times = {f.name: f.stat().st_mtime_ns for f in files}
    wanted = files[4].read_bytes()
    files[4].unlink()
    again = TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache", "fp32", 2)
    assert "of it to be written" in again.told()
    assert again.fill() == 1
    assert files[4].read_bytes() == wanted, "what collation draws is the same again"
    assert all(f.stat().st_mtime_ns == times[f.name] for f in files if f != files[4])
    files[2].write_bytes(wanted[:100])
    with pytest.raises(ValueError, match=f"{files[2].name}: damaged .*delete it"):
        again.fill()


def test_several_processes_divide_a_fill(filled, monkeypatch):
    written = []
    monkeypatch.setattr(filled, "folder", filled.folder / "nothing")
    monkeypatch.setattr(filled, "_write", lambda view, start: written.append((view, start)))
    monkeypatch.setattr(filled, "_opened", lambda file: {})
    monkeypatch.setattr(filled, "shards", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, own in ((0, [(0, 0), (0, 48), (1, 24)]), (1, [(0, 24), (1, 0), (1, 48)])):
        written.clear()
        monkeypatch.setenv("RANK", str(rank))
        filled.fill()
        assert written[:3] == own and len(written) == 6, "then those that another has not written yet"


def test_texts_that_are_cut_elsewhere_and_another_configuration_have_another_cache(tiny_raw):
    raw = tiny_raw("tiny-vilt", "vqa", ["unipt"])
    folders = []
    for longest, heads in ((6, 4), (40, 4), (40, 2)):
        parts = assembly.assemble(recipe.expand({**raw, "backbone": {**raw["backbone"], "max_text": longest}}, "x")[0])
        parts.attach()
        parts.model.backbone.model.config.num_attention_heads = heads
        table = parts.source.load("vqa", "train")
        folders.append(TableCache(parts.model, parts.methods, table, None).folder)
    assert len(set(folders)) == 3


def test_a_disk_that_is_too_small_is_said_beforehand(clip, tmp_path, monkeypatch):
    cache = TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 10**6))
    with pytest.raises(OSError, match=r"cache: needs 1\d.\d MB more in .*where 1.0 MB are free: set .*int8"):
        cache.fill()
    assert not (tmp_path / "cache").exists()


def test_what_is_written_when_the_disk_fills_stays_usable(clip, tmp_path, monkeypatch):
    cache = TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache")
    save, written = stored.save_file, []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(tensors, file):
        if written:  # no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
        written.append(file)
        save(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(stored, "save_file", full)
        try:
            with pytest.raises(
                OSError, match=r"not written .*large.*The 1 shards that are there stay usable: free 1?\d."
            ):
                cache.fill()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == ["key.json", "view-0-row-00000000.safetensors"]
    assert cache.fill() == 2 and len(cache.batch([0, 63])) > 3


def test_a_fill_that_is_killed_goes_on_with_the_same_numbers(filled, clip, tmp_path):
    cache = TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache", "fp32", 2)
    save, written = stored.save_file, []

    def killed(tensors, file):
        if len(written) == 2:
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(file)
        save(tensors, file)

    if not (child := os.fork()):
        stored.save_file = killed
        try:
            torch.set_num_threads(1)  # the parent's threads are not here
            cache.fill()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (half,) = cache.folder.glob(".view-*")
    os.utime(half, (0, 0))
    assert cache.fill() == 4, "of six"
    assert not half.exists(), "what nobody writes any more"
    found, wanted = cache.batch(range(128)), filled.batch(range(128))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_shards_that_belong_to_nothing_known_are_refused(filled, clip, tmp_path):
    shutil.copytree(filled.folder, tmp_path / "cache")
    (tmp_path / "cache" / "key.json").unlink()
    with pytest.raises(ValueError, match=r"6 shards of a cache without its key.json.*delete the folder"):
        TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache", "fp32", 2)


def test_a_folder_that_another_cache_took_since_is_refused(tmp_path):
    def made(of):
        columns, rows = {"x": Column((2,), torch.float32)}, torch.ones(4, 2)
        return stored.ActivationCache(tmp_path / "cache", {"of": of}, 4, 1, columns, lambda *_: {"x": rows * of})

    first, second = made(1), made(2)
    assert first.fill() == 1
    with pytest.raises(ValueError, match="a cache of another of: 1, needed is 2"):
        second.fill()


def test_views_draw_other_crops_and_the_same_captions_as_without(filled, clip, tmp_path):
    cache = cached(*clip, tmp_path / "cache", "fp32", 2, augmentation=Augmentation(crop=0.5))
    plain, first, second = filled.batch(range(64)), cache.batch(range(64)), cache.batch(range(64, 128))
    (picture,), (words,) = names(filled, "vision:0.map0"), names(filled, "text:0.map0")
    assert not torch.equal(first[picture], second[picture])
    assert not torch.equal(first[picture], plain[picture])
    assert torch.allclose(first[words], plain[words], atol=1e-5)
    with pytest.raises(ValueError, match=r"a cache of another augmentation: Augmentation\(crop=0.5, light=0.0, "):
        TableCache(clip[0].model, clip[0].methods, clip[1], tmp_path / "cache", "fp32", 2)


def test_methods_that_read_the_same_share_a_cache(clip, tiny_raw, tmp_path):
    cached(*assembled(tiny_raw, method="lst"), tmp_path / "lst", "fp32", 2)
    parts, table = assembled(tiny_raw, form="token")
    shared = TableCache(parts.model, parts.methods, table, tmp_path / "lst", "fp32", 2)
    assert shared.fill() == 0
    own = cached(parts, table, tmp_path / "own", "fp32", 2)
    one, two = (CachedModel(cache).eval()(**cache.batch([3, 60, 100])) for cache in (shared, own))
    assert torch.equal(one["loss"], two["loss"])
    for other in (clip, assembled(tiny_raw, method="side-tuning")):  # UniPT's vectors stand elsewhere; one map is read
        with pytest.raises(ValueError, match="a cache of another layers"):
            TableCache(other[0].model, other[0].methods, other[1], tmp_path / "lst", "fp32", 2)


def test_a_stale_cache_is_refused(clip, filled, tiny_raw, tmp_path):
    parts, table = clip

    def again(parts, table, precision="fp32", views=2):
        TableCache(parts.model, parts.methods, table, filled.folder, precision, views)

    again(parts, table)
    for what, args in (("precision", (parts, table, "int8")), ("table", (parts, table.select(range(63, -1, -1)))),
                       ("layers", assembled(tiny_raw, layers=[0, 2]))):  # fmt: skip
        with pytest.raises(ValueError, match=f"a cache of another {what}: .*delete the folder"):
            again(*args)
    other, _ = assembled(tiny_raw)
    with torch.no_grad():
        other.plain.text_model.final_layer_norm.weight.add_(1)
    with pytest.raises(ValueError, match="a cache of another backbone"):
        again(other, table)
    weight = other.plain.unipt["text"].up.weight
    with torch.no_grad():
        other.plain.text_model.final_layer_norm.weight.sub_(1)
        weight.add_(1)
    again(other, table)  # training changes side networks, not what they read
    key = json.loads((filled.folder / "key.json").read_text())
    for text, message in ((json.dumps(key | {"format": 1}), "a cache of format 1, .*delete the folder"),
                          ("{", "not the key of a cache"), ("7", "not the key of a cache")):  # fmt: skip
        folder = tmp_path / text[:1] / f"{len(text)}"
        folder.mkdir(parents=True)
        (folder / "key.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            TableCache(parts.model, parts.methods, table, folder)


@pytest.mark.parametrize("count", [1, 3])
def test_a_table_of_a_few_rows_is_cached_too(count, clip, tmp_path):
    cache = cached(clip[0], clip[1].select(range(count)), tmp_path / "cache", "fp32")
    assert CachedModel(cache).eval()(**cache.batch(range(count)))["loss"].isfinite()


def test_a_changed_caption_is_another_table(clip):
    table = encoded(clip[1])
    captions = [["another"] if i == 41 else told for i, told in enumerate(table["captions"])]
    other = table.remove_columns("captions").add_column("captions", captions)
    assert collation.table_print(table) == collation.table_print(table) != collation.table_print(other)


def test_what_cannot_be_trained_from_a_cache_says_why(tiny_raw, tmp_path, clip, monkeypatch):
    why = (
        r"no block of 'tiny-clip' stays the same .*vision_model.encoder.layers.0': it holds, or calls, what is trained"
    )
    with pytest.raises(recipe.RecipeError, match=why):
        run.run(recipe.expand(tiny_raw("tiny-clip", "retrieval", ["lora"], cache="fp16"), "test")[0], tmp_path / "run")
    parts, table = assembled(tiny_raw, "tiny-vilt", {"name": "matching", "pool": 8})[0], clip[1]
    with pytest.raises(ValueError, match="'input_ids' of a sample of task 'matching' is made from other rows of its"):
        TableCache(parts.model, parts.methods, table, tmp_path / "cache")
    monkeypatch.setattr(type(clip[0].model.backbone.pictures), "fixed", False)
    with pytest.raises(ValueError, match="keeps the shape of pictures"):
        TableCache(clip[0].model, clip[0].methods, table, tmp_path / "cache")


def test_a_cache_goes_with_masks_of_weights_that_are_not_trained(tiny_raw, tmp_path):
    losses = []
    for cache in (None, "fp32"):
        pruned = {"name": "multiflow", "sparsity": 0.5, "batches": 1}
        raw = tiny_raw("tiny-vilt", "vqa", [pruned, "linear-probe"], cache=cache)
        folder = run.run(recipe.expand(raw, "test")[0], tmp_path / f"run-{cache}", measure_costs=False)
        losses.append([h["loss"] for h in json.loads((folder / "metrics.json").read_text())["history"]])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[0]


def test_a_recipe_augments_with_and_without_a_cache(tiny_raw, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Augmentation, "__call__", lambda self, rows, generator=None: seen.append(self) or rows)
    for cache in (None, "fp16"):
        raw = tiny_raw("tiny-clip", "retrieval", ["unipt"], cache=cache, crop=0.6, light=0.2)
        run.run(recipe.expand(raw, "test")[0], tmp_path / f"run-{cache}", measure_costs=False)
        assert seen and set(seen) == {Augmentation(0.6, 0.2)}
        seen.clear()
    with pytest.raises(recipe.RecipeError, match=r"training: crop must lie in \(0, 1\], found 2"):
        recipe.expand(tiny_raw("tiny-clip", "retrieval", ["unipt"], crop=2.0), "test")


@pytest.mark.parametrize("method", ["sherl", pytest.param("unipt", marks=pytest.mark.slow)])
def test_a_recipe_trains_from_a_cache_as_without(method, tiny_raw, tmp_path, capsys):
    """Nothing is drawn for these questions: the same rows in the same order give the same losses."""
    histories = {}
    for cache in (None, "fp32", "fp16"):
        methods = [{"name": "omp", "sparsity": 0.5}, method]  # whose zeros a callback looks after
        raw = tiny_raw("tiny-vilt", "vqa", methods, cache=cache, head_multiplier=2.0, accumulate=2)
        folder = run.run(recipe.expand(raw, "test")[0], tmp_path / f"run-{cache}", measure_costs=False)
        metrics = json.loads((folder / "metrics.json").read_text())
        histories[cache] = [h["loss"] for h in metrics["history"]]
    assert "of 8 blocks need not run; " in capsys.readouterr().out
    assert histories["fp32"] == pytest.approx(histories[None], abs=1e-5) and len(histories[None]) == 3
    assert histories["fp16"] == pytest.approx(histories[None], abs=1e-2)
    parts = folder_of_runs.load_assembly(folder)
    table = parts.source.load("vqa", "test")
    assert training.evaluate(parts.model.eval(), table)[0] == metrics["test"]
    fresh = assembly.assemble(recipe.expand({**raw, "methods": [method]}, "test")[0])
    fresh.attach()
    trained = dict(parts.model.named_parameters())
    changed = {n for n, p in fresh.model.named_parameters() if not torch.equal(p, trained[n])}
    assert any(f".{method}." in n for n in changed) and any(n.startswith("head.") for n in changed)


COLUMN = Column((4, 3), torch.float32, packed=True)


def test_int8_maps_are_off_by_half_a_step():
    maps = torch.randn(5, 4, 3) * torch.tensor([0.1, 1.0, 100.0])
    stored = pack("x", maps, "int8")
    assert stored["x"].dtype == torch.int8 and stored["x.scale"].shape == (1, 1, 3)
    error = (unpack(stored, "x", torch.arange(5), COLUMN) - maps).abs().amax(dim=(0, 1))
    assert (error <= stored["x.scale"][0, 0] * 0.5001).all()


def test_what_half_precision_cannot_hold_is_refused():
    maps = torch.tensor([[[1e5]]])
    with pytest.raises(ValueError, match=r"x has values up to 100000, too large for fp16: use int8 or fp32"):
        pack("x", maps, "fp16")
    assert unpack(pack("x", maps, "int8"), "x", torch.tensor([0]), COLUMN) == 1e5
    for precision in ("fp16", "fp32", "int8"):
        with pytest.raises(ValueError, match="x with values that are not finite"):
            pack("x", maps * torch.nan, precision)


def test_grids_have_a_scale_for_each_channel_of_a_sample():
    grids = torch.randn(5, 3, 4, 4) * torch.tensor([0.1, 1.0, 100.0])[:, None, None]
    stored = pack("x", grids, "int8")
    rows = torch.tensor([3, 0])
    error = (unpack(stored, "x", rows, COLUMN) - grids[rows]).abs().amax(dim=(2, 3))
    assert (error <= stored["x.scale"][rows, :, 0, 0] * 0.5001).all()

"""What the tests of skipping share: losses that are known, a small ViLT, and the session of a small run."""

from __future__ import annotations

from torch import nn
from transformers import ViltConfig, ViltModel

from trimtab import Anatomy
from trimtab.experiments import assembly, recipe, training
from trimtab.methods.skip.plan import Plan

COSTS = [0.9, 0.1, 0.5, 0.8, 0.2, 0.7, 0.6, 0.4]  # what skipping each block adds to the loss
BEST = (1, 4, 7)


def losses(plans):
    return [1 + sum(COSTS[i] for i in plan) for plan in plans]


def vilt(count: int = 4, width: int = 32) -> ViltModel:
    config = ViltConfig(hidden_size=width, num_hidden_layers=count, num_attention_heads=4, intermediate_size=64,
                        vocab_size=50, image_size=16, patch_size=8)  # fmt: skip
    return ViltModel(config)


def plan_of(model: nn.Module, *skipped: int) -> Plan:
    anatomy = Anatomy.of(model)
    return Plan.of(model, anatomy, list(anatomy.blocks()), skipped, [0.5, -0.25, 0.0, 1.0], method="das")


def session_of(tiny_raw, method: dict, folder=None, **changes) -> tuple:
    raw = tiny_raw("tiny-vilt", "vqa", [method], **changes)
    r = recipe.expand(raw, "test")[0]
    parts = assembly.assemble(r)
    tables = [parts.source.load("vqa", split) for split in ("train", "validation")]
    parts.model.backbone.requires_grad_(False)
    return parts, training.TrainingSession(parts.model, *tables, r.training, r.seed, "test", folder)


def prepared(tiny_raw, method: dict, folder=None, **changes) -> dict:
    parts, session = session_of(tiny_raw, method, folder, **changes)
    parts.methods[0].prepare(session)
    return parts.methods[0].state

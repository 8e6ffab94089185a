"""CLIP-ViL's checkpoint files as its authors published them (clip-vil/CLIP-ViL, pretraining and VQA), and its sizes
without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trimtab.backbones.official import CheckpointError, Format, Item, Tensors, choose, head_count, renamed
from trimtab.registry import unknown


class ClipVilFormat(Format):
    """`Epoch11_LXRT.pth` (pretrained) and `BEST_LXRT.pth` (VQA)."""

    # The rest of CLIP (its text tower and attention pooling), boxes that grids do not have, a second name of the word
    # embeddings, and heads of the task that was not asked for.
    leftovers = (r"\.visual_model\.(?!visual\.)", r"\.visual\.attnpool\.", r"num_batches_tracked$", r"\.box_",
                 r"^cls\.|^answer_head\.|^logit_fc\.")  # fmt: skip
    fresh = (r"^logit_fc\.",)

    def recognises(self, keys: Collection[str]) -> bool:
        return any("bert.encoder.visual_model." in k or "bert.encoder.visn_fc." in k for k in keys)

    def plan(
        self, state: Tensors, extras: dict[str, Any], *, task: str | None = None, answers: int = 3129,
        heads: int | None = None,
    ) -> tuple[type, Any]:  # fmt: skip
        """CLIP-ViL's class and config. Pictures may have any size that the tables of positions reach.

        Args:
            task: `pretrain` or `vqa`; None takes that of the file. A head for VQA that the file does not have is new:
                the authors' way to start it from pretraining's answers needs their list of answers.
            answers: outputs of a new head for VQA.
            heads: attention heads, which no tensor tells; None takes width / 64.
        """
        from transformers import BertConfig

        from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel

        found = task or ("vqa" if "logit_fc.3.weight" in state else "pretrain")
        if found not in ("pretrain", "vqa"):
            raise CheckpointError(unknown("task of CLIP-ViL", found, ("pretrain", "vqa")))
        root = _root(state)
        embeddings, layers = f"{root}embeddings.", f"{root}encoder.layer."
        words, width = (state.size(f"{embeddings}word_embeddings.weight", dim) for dim in (0, 1))
        text = BertConfig(
            vocab_size=words, hidden_size=width, num_hidden_layers=state.count(layers),
            num_attention_heads=head_count(width, heads, "heads"),
            intermediate_size=state.size(f"{layers}0.intermediate.dense.weight"), layer_norm_eps=1e-12,
            max_position_embeddings=state.size(f"{embeddings}position_embeddings.weight"),
            type_vocab_size=state.size(f"{embeddings}token_type_embeddings.weight"),
        )  # fmt: skip
        visual = f"{root}encoder.visual_model.visual."
        config = ClipVilConfig(
            text_config=text, vision_width=state.size(f"{visual}conv3.weight"),
            vision_layers=[state.count(f"{visual}layer{i}.") for i in range(1, 5)],
            positions=state.size(f"{root}encoder.visual_pos.x_position_embedding.weight"),
            pretraining_answers=state.size("answer_head.logit_fc.3.weight") if found == "pretrain" else 0,
            answers=0 if found == "pretrain" else _answers(state, answers),
        )  # fmt: skip
        return ClipVilModel, config

    def weights(self, state: Tensors, extras: dict[str, Any], config: Any) -> Iterator[Item]:
        root = _root(state).replace(".", r"\.")
        rules: list[tuple[str, str | tuple[str, ...]]] = [
            (rf"{root}(embeddings\..*)", r"bert.\1"), (rf"{root}(encoder\.layer\..*)", r"bert.\1"),
            (rf"{root}encoder\.visual_model\.visual\.((?:conv|bn|layer).*)", r"vision.\1"),
            (rf"{root}encoder\.visual_pos\.([xy]_position_embedding\.weight)", r"\1"),
            (rf"{root}encoder\.visn_fc\.(visn_fc|visn_layer_norm)\.(\w+)", r"\1.\2"),
            (rf"{root}(pooler\.dense\.\w+)", r"\1"),
        ]  # fmt: skip
        if config.pretraining_answers:
            rules += [
                (r"cls\.predictions\.(bias|transform\..*)", r"cls.\1"), (r"cls\.(seq_relationship\..*)", r"cls.\1"),
                (r"answer_head\.logit_fc\.(.*)", r"answer_head.\1"),
            ]  # fmt: skip
        if config.answers:
            rules.append((r"logit_fc\..*", r"\g<0>"))
        yield from renamed(state, rules)


def _root(state: Tensors) -> str:
    """Where BERT stands: fine-tuned files hold it inside an encoder."""
    return "lxrt_encoder.model.bert." if any(k.startswith("lxrt_encoder.") for k in state) else "bert."


def _answers(state: Tensors, new: int) -> int:
    return state.size("logit_fc.3.weight") if "logit_fc.3.weight" in state else new


def architecture(vision: str = "RN50x4", task: str = "vqa", answers: int = 3129) -> tuple[type, Any]:
    """CLIP-ViL: the grid of a CLIP ResNet and text in one BERT-base.

    Args:
        vision: `RN50x4` or `RN50`.
        task: `pretrain` or `vqa`.
        answers: outputs of the `vqa` head.
    """
    from transformers import BertConfig

    from trimtab.backbones.clip_vil.model import ClipVilConfig, ClipVilModel

    sizes = {"RN50x4": (80, [4, 6, 10, 6]), "RN50": (64, [3, 4, 6, 3])}
    width, layers = choose("vision of CLIP-ViL", vision, sizes)
    heads: dict[str, dict[str, Any]] = {"pretrain": {"pretraining_answers": 9500}, "vqa": {"answers": answers}}
    head = choose("task of CLIP-ViL", task, heads)
    return ClipVilModel, ClipVilConfig(text_config=BertConfig(), vision_width=width, vision_layers=layers, **head)

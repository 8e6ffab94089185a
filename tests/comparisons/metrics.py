"""Cases of metrics: questions, pairs, classes and captions against the numbers of the official code.

A case is a JSON file alone; what it is of is read from its fields.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.conformance import Case, Check, Skipped, metric, number
from trimtab.metrics import answers, captions, coco_java, gqa, nlvr2, ptb, vqa, words


def numbers(quantity: str, found: Sequence[float], wanted: Sequence[float]) -> Check:
    """The worst of a list."""
    if len(found) != len(wanted):
        return Check(f"{quantity}: {len(found)} numbers for {len(wanted)}", float("inf"), 1e-6)
    checks = [number(f"{quantity} {i}", f, w) for i, (f, w) in enumerate(zip(found, wanted, strict=True))]
    return max(checks, key=lambda c: (not c.passed, c.error))


def table(quantity: str, found: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Check]:
    """Every number of a table that may have tables in it; names are compared as JSON has them."""
    found = {str(name): value for name, value in found.items()}
    for name, value in wanted.items():
        what = f"{quantity} {name}"
        if name not in found:
            yield Check(f"{what}: not computed", float("inf"), 1e-6)
        elif isinstance(value, dict):
            yield from table(what, found[name], value)
        elif isinstance(value, list):
            yield numbers(what, found[name], value)
        else:
            yield number(what, found[name], value)
    if extra := found.keys() - wanted.keys():
        yield Check(f"{quantity}: {len(extra)} names that the official result does not have", len(extra), 0)


def same(quantity: str, found: Sequence[Any], wanted: Sequence[Any]) -> Check:
    """How many of two lists differ."""
    wrong = sum(f != w for f, w in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))
    return Check(quantity, wrong, 0)


def _annotated(info: dict[str, Any]) -> dict[Any, Any]:
    annotations = info["annotations"]
    rows = annotations["annotations"] if isinstance(annotations, dict) else annotations
    return {row["question_id"]: row for row in rows}


@metric("vqa accuracy", "annotations", "results", told=("what", "how", "questions"))
def vqa_accuracy(case: Case) -> Iterator[Check | Skipped]:
    told = _annotated(case.info)
    predictions = {row["question_id"]: row["answer"] for row in case.info["results"]}
    for name, rule in (("official", "official"), ("other_copy", "x-vlm")):
        if name in case.info:
            result = vqa.evaluate(told, predictions, rule=rule)  # type: ignore[arg-type]
            yield from _vqa_numbers(name, told, result, case.info[name])
    for name, normalise in (("normalise", words.normalise), ("vilt_normalize_word", words.normalise_vilt)):
        if name in case.info:
            wanted = case.info[name]["table"]
            yield same(name, [normalise(text) for text in wanted], list(wanted.values()))


def _vqa_numbers(name: str, told: dict[Any, Any], result: dict[str, Any], wanted: dict[str, Any]) -> Iterator[Check]:
    def official(result: dict[str, Any]) -> dict[str, Any]:
        names = {"overall": "overall", "perQuestionType": "by_question_type", "perAnswerType": "by_answer_type"}
        return {theirs: result[ours] for theirs, ours in names.items()}

    each = vqa.rounded(result["by_question"])
    yield from table(f"{name} accuracy", official(vqa.rounded(result)), wanted["accuracy"])
    if "per_question" in wanted:
        yield from table(f"{name} question", each, wanted["per_question"])
    if "accuracy_unrounded_10" in wanted:
        yield from table(f"{name} unrounded", official(result), wanted["accuracy_unrounded_10"])
    for field, key in (("question_type", "per_question_type"), ("answer_type", "per_answer_type")):
        groups: dict[str, dict[Any, float]] = {}
        for question, score in each.items():
            groups.setdefault(told[question].get(field), {})[str(question)] = score
        if key in wanted:
            yield from table(f"{name} {field}", groups, wanted[key])


@metric("vqa accuracy of single questions", "cases.answers", "cases.prediction", told=("how", "what"))
def vqa_single(case: Case) -> Iterator[Check | Skipped]:
    for row in case.info["cases"]:
        yield number(row.get("case", "case"), 100 * vqa.score(row["answers"], row["prediction"]), row["official"])


@metric("vqa soft score", "logits", "targets", told=("how", "what"))
def vqa_soft(case: Case) -> Iterator[Check | Skipped]:
    logits, targets = (torch.tensor(case.info[name], dtype=torch.float64) for name in ("logits", "targets"))
    found, official = answers.soft_accuracy(logits, targets), case.info["official"]
    best = logits.float() == logits.float().amax(dim=1, keepdim=True)
    low = targets.masked_fill(~best, 9).amin(dim=1).mean().item()
    high = targets.masked_fill(~best, -9).amax(dim=1).mean().item()
    if high - low > 1e-9:
        yield Check("within the bounds that equal maxima leave", max(low - found, found - high, 0), 1e-6)
        yield Check("official within those bounds", max(low - official, official - high, 0), 1e-6)
    else:
        yield number("soft score", found, official)


@metric("gqa", "questions", "predictions", told=("how", "what", "notes"))
def gqa_metrics(case: Case) -> Iterator[Check | Skipped]:
    told = {row["questionId"]: row["prediction"] for row in case.info["predictions"]}
    questions, choices = case.info["questions"], case.info.get("choices")
    for name, wanted in case.info["official"].items():
        # What was asked for is in the name of the result; a part that was not is 0 there.
        chosen = None if "no_choices" in name else choices
        asked = "consistency" in name and "no_consistency" not in name
        kept = questions
        if "balanced_only" in name:
            kept = {question: row for question, row in questions.items() if row["isBalanced"]}
        result = gqa.evaluate(kept, told, chosen, consistency=asked, extra=True)
        plain = {key: value or 0 for key, value in result.items() if not key.startswith("by_")}
        types = {
            "accuracyPerStructuralType": result["by_structural_type"],
            "accuracyPerSemanticType": result["by_semantic_type"],
            "accuracyPerLength": result["by_length"],
            "accuracyPerSteps": result["by_steps"],
        }
        yield from table(name, {k: v for k, v in (plain | types).items() if k in wanted}, wanted)


@metric("nlvr2", "examples", "predictions_csv", told=("how", "what", "n_sentence_groups", "notes"))
def nlvr2_metrics(case: Case) -> Iterator[Check | Skipped]:
    labels = {row["identifier"]: row["label"] for row in case.info["examples"]}
    rows = [row for row in csv.reader(io.StringIO(case.info["predictions_csv"])) if row]
    told = {row[0].strip(): row[1].strip() for row in rows}
    found, official = nlvr2.evaluate(labels, told, extra=True), case.info["official"]
    yield number("accuracy", found["accuracy"], official["accuracy"])
    yield number("consistency", found["consistency"], official["consistency"])
    if "filtered_accuracy_percent" in official:
        kept = [name for name in labels if told[name].lower() in ("true", "false")]
        share = nlvr2.evaluate({name: labels[name] for name in kept}, told, extra=True)["accuracy"]
        yield number("filtered accuracy", 100 * share, official["filtered_accuracy_percent"])


@metric("class accuracy", "logits", "gold_labels", told=("how", "what"))
def class_metrics(case: Case) -> Iterator[Check | Skipped]:
    logits, ids, gold = case.info["logits"], case.info["label_ids"], case.info["gold_labels"]
    official = case.info["official"]
    yield number("accuracy", answers.class_accuracy(logits, [ids[name] for name in gold]), official["accuracy"])
    if "label_ids_with_ignored" in case.info:
        kept = case.info["label_ids_with_ignored"]
        yield number("with rows left out", answers.class_accuracy(logits, kept), official["accuracy_with_ignored"])
    if "predicted" in case.info:
        found = answers.label_accuracy(case.info["predicted"], gold)
        yield number("by name", found["accuracy"], official["accuracy"])
        yield from table("label", found["by_label"], case.info.get("derived_per_class", found["by_label"]))


@metric("captions", "captions", told=("how", "what", "notes", "spice", "meteor"))
def caption_metrics(case: Case) -> Iterator[Check | Skipped]:
    told, tokens = case.info["captions"], case.info["tokens"]
    ids = list(told["references"])
    official = case.info["official"]
    for name, wanted in official.items():
        given = tokens[name]
        mine = [given["candidates"][i].split() for i in ids]
        refs = [[ref.split() for ref in given["references"][i]] for i in ids]
        result = captions.evaluate_words(mine, refs)
        yield from table(name, _official(result), wanted)
        if each := case.info.get("per_image", {}).get(name):
            order = [ids.index(str(i)) for i in each["image_ids"]]
            lists = _official(result["by_caption"])
            for metric_name in wanted:
                yield numbers(f"{name} {metric_name}", [lists[metric_name][i] for i in order], each[metric_name])
        texts = [told["candidates"][i] for i in ids], [told["references"][i] for i in ids]
        split, reason = _tokeniser(name, [*texts[0], *(text for group in texts[1] for text in group)])
        if split is None:
            yield Skipped(f"words by {name}: {reason}")
        else:
            yield same(f"words by {name}", [split(t) for t in texts[0]], mine)
            yield same(f"words of references by {name}", [[split(t) for t in group] for group in texts[1]], refs)
            whole = captions.evaluate(told["candidates"], told["references"], tokenise=split)
            yield from table(f"{name} from texts", _official(whole), wanted)
        yield from _meteor(case, name, mine, refs)
    if "ciderD_second_implementation" in case.info:
        second, given = case.info["ciderD_second_implementation"], tokens["simple"]
        mine = [given["candidates"][i].split() for i in ids]
        refs = [[ref.split() for ref in given["references"][i]] for i in ids]
        yield numbers("CIDEr-D of X-VLM's copy", captions.cider_of_words(mine, refs), second["per_image"])


def _tokeniser(name: str, texts: list[str]) -> tuple[captions.Tokenise | None, str]:
    """Words of a text by a tokenisation of that name; texts that ours may split otherwise than the official one go to
    that, where it is installed."""
    if name == "simple":
        return captions.simple_words, ""
    if name != "ptb":
        return None, "the library does not have this tokenisation"
    odd = sorted({text for text in texts if ptb.doubtful(text)})
    if odd and (missing := coco_java.missing()):
        return None, f"{len(odd)} texts need the official tokeniser, but {missing}"
    known = dict(zip(odd, coco_java.tokenise(odd), strict=True)) if odd else {}
    return lambda text: known[text].split() if text in known else ptb.tokens(text), ""


def _official(result: dict[str, Any]) -> dict[str, Any]:
    """Our names -> those of pycocoevalcap."""
    names = {f"BLEU-{n}": f"Bleu_{n}" for n in range(1, 5)} | {"ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}
    return {theirs: result[ours] for ours, theirs in names.items()}


def _meteor(case: Case, name: str, mine: Any, refs: Any) -> Iterator[Check | Skipped]:
    wanted = case.info.get("meteor", {}).get(name)
    if wanted is None:
        return
    if reason := coco_java.missing():
        yield Skipped(f"METEOR of {name}: {reason}")
        return
    total, each = coco_java.meteor(mine, refs)
    yield number(f"{name} METEOR", total, wanted["METEOR"])
    yield numbers(f"{name} METEOR", each, wanted["per_image"])

"""The task `answer` on tiny folders of today's chat models, loaded as their users' are."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.models.chats import CHATS, SPECIAL, picture, tokenizer, write_chat
from trimtab import backbones
from trimtab.backbones.chat.words import IGNORED, ConversationError
from trimtab.experiments import folder as folders
from trimtab.experiments.recipe import expand
from trimtab.experiments.run import run
from trimtab.methods import METHODS
from trimtab.tasks import TaskModel
from trimtab.tasks.answer import Answer

ROWS = [
    {"images": [picture()], "question": "what is in the picture ?", "answer": "a red dog"},
    {"images": [picture(30, 30), picture(9, 33, "green")], "question": "what ?", "answer": "yes"},
    {"images": [], "question": "and two cats", "answer": "no no"},
    {"images": [picture(40, 10, "white")], "question": "a letter", "answer": "two blue cats"},
]
MARKS = [i for i, mark in enumerate(SPECIAL) if mark != "</s>"] + tokenizer().convert_tokens_to_ids(["Ċ"])  # and lines


def rows_of(name: str) -> list[dict]:
    """Rows that a family takes: without a chat template one picture each."""
    return ROWS if CHATS[name].picture else [r for r in ROWS if len(r["images"]) == 1]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Backbones by name, each made once; nothing trains them."""
    made: dict[str, backbones.Backbone] = {}

    def get(name: str) -> backbones.Backbone:
        if name not in made:
            made[name] = backbones.load(write_chat(name, tmp_path_factory.mktemp("chats") / name), kind="chat")
            made[name].model.generation_config.suppress_tokens = MARKS  # random weights would write little else
        return made[name]

    return get


@pytest.fixture
def folder(chats, tmp_path):
    """A copy of a family's folder, to be changed."""

    def copy(name: str):
        return shutil.copytree(chats(name).folder, tmp_path / name)

    return copy


def task_of(name: str, **settings) -> Answer:
    return Answer(template=CHATS[name].prompt, **settings)


# --- the families -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_the_loss_is_on_the_answer_alone(chats, name):
    backbone, task, rows = chats(name), task_of(name), rows_of(name)
    batch = task.collate(backbone, rows, True)
    labels, ends = batch["labels"], backbone.batches.words.ends
    for i, row in enumerate(rows):
        told = labels[i][labels[i] != IGNORED].tolist()
        assert backbone.tokenizer.decode(told[:-1]).strip() == row["answer"] and told[-1] in ends
        if backbone.writes_apart:
            continue
        whole = batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist()
        alone = task.collate(backbone, [row], False)["input_ids"][0].tolist()  # the prompt without an answer
        where = (labels[i][batch["attention_mask"][i] == 1] != IGNORED).nonzero()[:, 0].tolist()
        assert whole[: len(alone)] == alone
        assert where == list(range(len(alone), len(alone) + len(told)))  # all of the answer, from its first token on
    logits = backbone.told(batch)[0]
    alone = torch.cat([backbone.told(task.collate(backbone, [row], True))[0] for row in rows])
    assert torch.allclose(logits, alone, atol=1e-4)  # what fills rows up changes nothing
    loss = TaskModel(backbone, task)(**batch)["loss"]
    assert loss.item() == pytest.approx(backbone.model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", CHATS)
def test_rows_of_a_padded_batch_are_answered_as_each_alone(chats, name):
    model = TaskModel(chats(name), task_of(name, longest=4, shortest=4))
    answers = model.answer(rows_of(name))
    assert answers == [model.answer([row])[0] for row in rows_of(name)]
    assert len({a["answer"] for a in answers}) > 1 or name == "florence2"  # it says one thing whatever it sees


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_answers_are_what_the_model_finds_likeliest_word_by_word(chats, name):
    backbone = chats(name)
    batch = task_of(name).collate(backbone, ROWS[:1], False)
    ids, words = batch["input_ids"], []
    for _ in range(3):
        more = torch.ones_like(ids[:, batch["input_ids"].shape[1] :])
        grown = {**batch, "input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], more], 1)}
        if "mm_token_type_ids" in batch:
            grown["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], 0 * more], 1)
        logits = backbone.model(**grown).logits[:, -1]
        logits[:, [2, *MARKS]] = -9e9  # no end among them
        words.append(logits.argmax(-1))
        ids = torch.cat([ids, words[-1][:, None]], 1)
    expected = backbone.tokenizer.decode(torch.cat(words), skip_special_tokens=True).strip()
    assert backbone.reply(batch, longest=3, shortest=3) == [expected]


def test_beams_and_lengths_are_handed_on(chats):
    backbone = chats("idefics3")
    batch = task_of("idefics3").collate(backbone, ROWS[:1], False)
    kept = backbone.model.generate
    seen = {}
    backbone.model.generate = lambda **how: seen.update(how) or kept(**how)
    try:
        (found,) = backbone.reply(batch, longest=3, shortest=2, beams=3, length_penalty=0.5)
    finally:
        del backbone.model.generate
    how = seen["generation_config"]
    assert (how.max_new_tokens, how.min_new_tokens, how.num_beams, how.length_penalty) == (3, 2, 3, 0.5)
    plain = kept(**batch, num_beams=3, max_new_tokens=3, min_new_tokens=2, length_penalty=0.5, do_sample=False,
                 suppress_tokens=MARKS)  # fmt: skip
    assert backbone.tokenizer.decode(plain[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip() == found


def test_pictures_of_any_mode_are_taken(chats):
    backbone = chats("gemma3")
    rows = [{"images": [picture().convert(mode)], "question": "?", "answer": "a"} for mode in ("RGB", "L", "P", "RGBA")]
    pixels = task_of("gemma3").collate(backbone, rows, True)["pixel_values"]
    assert pixels.shape[:2] == (4, 3) and torch.allclose(pixels[0], pixels[3], atol=1e-5)
    assert not torch.allclose(pixels[0], pixels[1], atol=1e-2)


def test_a_folder_that_is_read_otherwise_too_is_a_chat_model_where_one_is_asked_for(chats):
    path = chats("llava").folder
    assert backbones.load(path).kind == "joint" and backbones.load(path, kind="chat").kind == "chat"
    assert backbones.load(chats("gemma3").folder).kind == "chat"


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_chat_template_says_the_way_out(chats, folder):
    with pytest.raises(
        ConversationError, match="no chat template .*give the task a plain `template`, such as 'Question"
    ):
        Answer().collate(chats("blip-2"), ROWS[:1], True)
    path = folder("smolvlm")
    (path / "chat_template.jinja").unlink()
    backbone = backbones.load(path, kind="chat")
    with pytest.raises(ConversationError, match="put the model's chat_template.jinja into the folder"):
        Answer().collate(backbone, ROWS[:1], False)
    batch = Answer(template="{images} Question: {question} Answer:").collate(backbone, ROWS[:2], False)
    assert (batch["input_ids"] == 4).any(dim=1).all()  # both rows have their pictures' tokens


def changed(folder, name: str, old: str, new: str):
    path = folder(name) / "chat_template.jinja"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path.parent


def test_a_template_that_writes_the_prompt_otherwise_with_the_answer_is_refused(folder):
    path = changed(folder, "llava", "<s>assistant:{% endif %}", "<s>assistant: think{% endif %}")
    told = "does not begin an answered conversation with the prompt: .* expected 'think', found 'yes'"
    with pytest.raises(ConversationError, match=told):
        backbones.load(path, kind="chat").teach([[{"role": "user", "content": []}]], [[]], ["yes"])


def test_a_prompt_whose_tokens_go_on_in_the_answer_is_refused(folder):
    path = changed(folder, "llava", "<s>assistant:{% endif %}", "<s>assistant: th{% endif %}")
    backbone = backbones.load(path, kind="chat")
    told = "prompt's tokens are not the first .*: token . is ' t' alone and ' the' with the answer"
    with pytest.raises(ConversationError, match=told):
        backbone.teach([[{"role": "user", "content": []}]], [[]], ["the letter"])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_picture_is_never_taken_for_the_next_row_s(chats, name):
    """Both rows together have as many pictures as places: the processors see nothing wrong."""
    rows = [{**ROWS[0], "question": "what is <image> ?"}, {**ROWS[1], "question": "what ?"}]
    rows[1]["images"] = rows[1]["images"] + [picture()]
    asked = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": r["question"]}]}] for r in rows]
    with pytest.raises(
        ConversationError, match="conversation 0 of the batch has 1 pictures, and its prompt has '<image>' 2"
    ):
        chats(name).ask(asked, [r["images"] for r in rows])
    with pytest.raises(ConversationError, match="conversation 0 of the batch has 2 pictures"):
        chats("blip-2").ask(["what ?", "what ?"], [[picture(), picture()], []])


def test_too_long_a_conversation_is_refused_and_not_cut(chats):
    backbone = chats("idefics3")
    backbone.limit_text(40)
    try:
        with pytest.raises(ConversationError, match="conversation 1 of the batch has 73 tokens .* the limit is 40"):
            Answer().collate(backbone, [ROWS[2], ROWS[1]], True)
    finally:
        backbone.batches.longest = None
    with pytest.raises(ConversationError, match="the limit is 512"):
        Answer().collate(backbone, [{**ROWS[0], "question": "a b " * 300}], True)


def test_a_folder_without_a_processor_says_what_to_put_there(folder):
    path = folder("gemma3")
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"its Gemma3Processor cannot be made: .*AutoProcessor.from_pretrained\(MODEL\)"
    ):
        backbones.load(path)
    (path / "processor_config.json").write_text('{"processor_class": "OwnProcessor"}')
    with pytest.raises(ValueError, match="'processor_class' is 'OwnProcessor', which transformers does not have"):
        backbones.load(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"longest": 0}, "longest must be at least 1"),
        ({"wording": "{question} {choice}"}, "wording: unknown field {choice}"),
        ({"template": "Question: {images}"}, "template: expected '{question}' in it"),
        ({"template": "{question}", "system": "be short"}, "system: a plain `template` has no place"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Answer(**settings)


def test_tables_are_checked():
    chat, table = SimpleNamespace(kind="chat", name="x"), Dataset.from_dict({"question": ["?"], "answer": ["a"]})
    Answer().check(chat, table)
    with pytest.raises(ValueError, match=r"needs the columns \['choices', 'subject'\]"):
        Answer("choice", by=("subject",)).check(chat, table)
    with pytest.raises(ValueError, match="needs a chat backbone"):
        Answer().check(SimpleNamespace(kind="joint", name="x"), table)


# --- the whole --------------------------------------------------------------------------------------------------------


def recipe(path, tmp_path, methods: list, **task):
    for i, colour in enumerate(("red", "green")):
        picture(20 + 5 * i, 16, colour).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i % 2}.png", "question": "what ?", "answer": ("a red dog", "no")[i % 2]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raw = {
        "backbone": {"name": str(path)}, "task": {"name": "answer", "longest": 4, **task}, "methods": methods,
        "data": {"name": "files", "train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl")},
        "training": {"steps": 2, "batch_size": 2, "evaluation_batch": 2}, "costs": False,
    }  # fmt: skip
    return expand(raw, "answer")[0]


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("smolvlm", [{"name": "lora", "rank": 2}]),
        ("qwen2_5_vl", [{"name": "multiflow", "sparsity": 0.5, "batches": 2}, {"name": "random-skip", "skip": 1}]),
        ("internvl", [{"name": "unipt"}]),
        ("florence2", [{"name": "wanda", "sparsity": 0.5, "batches": 1}, {"name": "lora", "rank": 2}]),
    ],
)
def test_a_recipe_runs_to_a_folder_that_answers(chats, tmp_path, name, methods):
    out = run(recipe(chats(name).folder, tmp_path, methods, template=CHATS[name].prompt), tmp_path / "run")
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["primary"] == "exact match" and metrics["chance"] == 0.5 and "exact match" in metrics["test"]
    model = folders.load(out)
    shown = json.loads((out / "samples" / "samples.json").read_text())
    row = {"image": Image.open(tmp_path / "0.png"), "question": "what ?"}
    assert model.answer([row])[0]["answer"] == shown[0]["prediction"]
    assert shown[0]["query"] == "what ?" and (out / "samples" / shown[0]["image"]).is_file()


def test_an_exported_run_is_a_chat_folder_of_its_own(chats, tmp_path):
    out = run(recipe(chats("smolvlm").folder, tmp_path, [{"name": "lora", "rank": 2}]), tmp_path / "run")
    exported = folders.export(out, tmp_path / "plain")
    again = TaskModel(backbones.load(exported, kind="chat"), Answer(longest=4))
    row = {"image": Image.open(tmp_path / "0.png"), "question": "what ?"}
    assert again.answer([row]) == folders.load(out).answer([row])
    for kept in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (exported / kept).read_bytes() == (chats("smolvlm").folder / kept).read_bytes()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "blip-2", "florence2"])
def test_unipt_answers_with_a_cache_as_without(chats, name):
    backbone, task = backbones.load(chats(name).folder, kind="chat"), task_of(name)
    METHODS["unipt"]().attach(backbone.model.requires_grad_(False), backbone.anatomy)
    batch = task.collate(backbone, rows_of(name), False)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) if parameter.requires_grad else 0
    logits = []
    for cache in (True, False):
        how = {"use_cache": cache, "return_dict_in_generate": True, "output_logits": True, "suppress_tokens": MARKS}
        out = backbone.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, **how)
        logits.append(torch.stack(out.logits))
    finite = logits[0].isfinite()
    assert torch.allclose(logits[0][finite], logits[1][finite], atol=1e-4) and logits[0][finite].std() > 0.1

"""Rows in the chat format of transformers: `messages` with a role and a content each, and pictures among them.

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]}

A picture part names its file (`path`, `image` or `url`), or is a bare {"type": "image"}, which takes the next of the
row's `images`. A content may be one string.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.data.reading import Entry

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]
Find = Callable[[Entry, str], Any]  # a picture's name -> a cell of a picture column


def conversation(entry: Entry, find: Find, images: list[Any]) -> tuple[list[Message], list[Any]]:
    """A row's messages, each with a list of parts {"type", "text"}, and its pictures in the order of the picture parts.

    Args:
        entry: the row, with the field `messages`.
        find: gives the cell of a picture that a part names.
        images: cells of the row's own list of pictures, which bare picture parts take in order.

    Raises:
        RowError: if a message or part is none, a picture is missing or left over, or the last message is not an
            assistant's with words: there is nothing to learn then.
    """
    bare, found, messages = iter(images), [], []
    for message in entry.inner("messages"):
        parts: list[Message] = []
        for part in _parts(message):
            if part.get("type") == "text":
                parts.append({"type": "text", "text": part.text("text", empty=True)})
                continue
            name = next((part.get(k) for k in ("path", "image", "url") if part.values.get(k) is not None), None)
            cell = next(bare, None) if name is None else find(part, _local(part, name))
            if cell is None:
                raise part.error(f"expected a picture for each bare picture part, found {len(images)} in 'images'")
            found.append(cell)
            parts.append({"type": "image", "text": None})
        messages.append({"role": message.one_of("role", ROLES), "content": parts})
    if any(True for _ in bare):
        raise entry.error(f"expected a picture part for each of the {len(images)} pictures in 'images', found fewer")
    last = messages[-1] if messages else {"role": "nobody", "content": []}
    if last["role"] != "assistant" or not answer(messages).strip():
        raise entry.error(f"expected 'messages' to end with words of the assistant, found {last['role']!r}")
    return messages, found


def _parts(message: Entry) -> list[Entry]:
    if isinstance(message.get("content", (str, list)), str):
        return [Entry({"type": "text", "text": message.text("content", empty=True)}, message.file, message.row)]
    parts = message.inner("content")
    for part in parts:
        part.one_of("type", ("text", "image"))
    return parts


def _local(part: Entry, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise part.error(f"expected the path of a picture, found {name!r}")
    if "://" in name:
        raise part.error(f"expected a file here, found the address {name!r}; fetch the picture and give its path")
    return name


def answer(messages: list[Message]) -> str:
    """The words of the last message."""
    return "".join(part["text"] or "" for part in messages[-1]["content"]) if messages else ""

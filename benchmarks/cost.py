"""What `trimtab cost` takes: seconds and peak resident memory of every shipped recipe, all variants, without data.

    python benchmarks/cost.py [PATTERN ...] [--seconds 60] [--gigabytes 2] [--json FILE]

Each recipe is counted by a process of its own on one thread, started as a person starts it, and killed when it takes
twice the time or the memory. Seconds are the processor's, so that a busy machine changes them little; beside them stand
those of the clock. A recipe whose backbone is a folder gets one of the published size: config, processor and a small
tokenizer, no weights. The exit status is 1 if a recipe fails, or needs more than it may.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers as hf

from trimtab.experiments import recipe

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% for part in m['content'] %}{% if part['type'] == 'image' %}PICTURE"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<end>", "<image>", "<video>", "<boi>", "<eoi>", "<fake_token_around_image>",
           "<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))]  # fmt: skip
NAMES = {"image_token": "<image>", "video_token": "<video>", "fake_image_token": "<fake_token_around_image>",
         "global_image_token": "<global-img>", "end_of_utterance_token": "<end>"}  # fmt: skip


def words(**names: str) -> Any:
    """A tokenizer of single bytes and the special tokens: a question has more tokens than with the model's own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *letters])}, []))
    plain.add_special_tokens(SPECIAL)
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                      extra_special_tokens=names)  # fmt: skip


def chat(folder: Path, config: Any, images: Any, processor: str, shown: str = "<image>", **options: Any) -> None:
    """Files of a chat model as its authors publish it, but for the weights."""
    tokenizer = words(**NAMES)
    ids = tokenizer.convert_tokens_to_ids
    seen = {"image_token_id": "<image>", "image_token_index": "<image>", "video_token_id": "<video>",
            "vision_start_token_id": "<boi>", "vision_end_token_id": "<eoi>"}  # fmt: skip
    for field, token in seen.items():
        if hasattr(config, field):
            setattr(config, field, ids(token))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("PICTURE", shown))
    (folder / "preprocessor_config.json").write_text(json.dumps(images.to_dict(), default=str))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor, **options}))


def qwen(folder: Path) -> None:
    """Qwen3-VL-2B (huggingface.co/Qwen/Qwen3-VL-2B-Instruct, config.json)."""
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                "mrope_interleaved": True}}  # fmt: skip
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048,
              "patch_size": 16, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304}  # fmt: skip
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    images = hf.Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=65536, max_pixels=16777216)
    chat(folder, config, images, "Qwen3VLProcessor", "<boi><image><eoi>")


def smolvlm(folder: Path) -> None:
    """SmolVLM-256M (huggingface.co/HuggingFaceTB/SmolVLM-256M-Instruct, config.json)."""
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280,
            "max_position_embeddings": 8192}  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    config = hf.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, tie_word_embeddings=False)
    images = hf.SmolVLMImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    chat(folder, config, images, "SmolVLMProcessor", image_seq_len=64)


def llava(folder: Path) -> None:
    """LLaVA-1.5-7B (huggingface.co/llava-hf/llava-1.5-7b-hf): CLIP ViT-L/14 at 336 before LLaMA-7B."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
              "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
              "projection_dim": 768}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}  # its defaults are the 7B's
    side = {"height": 336, "width": 336}
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side)
    chat(folder, hf.LlavaConfig(text_config=text, vision_config=vision), images, "LlavaProcessor", "<image>\n",
         patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)  # fmt: skip


def dino(folder: Path) -> None:
    """DINO's ViT-B/16 (huggingface.co/facebook/dino-vitb16): a ViT of the usual sizes."""
    hf.ViTConfig().save_pretrained(folder)


def siglip(folder: Path) -> None:
    """SigLIP so400m/14 at 384 (huggingface.co/google/siglip-so400m-patch14-384)."""
    wide = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = hf.SiglipConfig(text_config={**wide, "vocab_size": 32000, "projection_size": 1152},
                             vision_config={**wide, "image_size": 384, "patch_size": 14})  # fmt: skip
    config.save_pretrained(folder)
    words().save_pretrained(folder)
    images = hf.SiglipImageProcessorPil(size={"height": 384, "width": 384})
    (folder / "preprocessor_config.json").write_text(json.dumps(images.to_dict(), default=str))


FOLDERS = {
    "own/answer": {"Qwen3-VL-2B": qwen, "SmolVLM-256M": smolvlm}, "own/retrieval": {"SigLIP-so400m": siglip},
    "published/das_llava_scienceqa": {"LLaVA-1.5-7B": llava}, "published/multiflow_dino_*": {"DINO-ViT-B": dino},
}  # fmt: skip
"""Recipes whose backbone is a folder -> folders that they are counted with."""


def runs(names: list[str], place: Path) -> list[tuple[str, str, list[str]]]:
    """A recipe, what it is counted with, and the overrides that say so."""
    out = []
    for name in names:
        made = next((folders for pattern, folders in FOLDERS.items() if fnmatch(name, pattern)), {"": None})
        for title, make in made.items():
            folder = place / title
            if make is not None and not folder.exists():
                folder.mkdir()
                make(folder)
            out.append((name, title, [f"backbone.name={folder}"] if make else []))
    return out


def watched(command: list[str], seconds: float, size: float, where: Path) -> dict[str, Any]:
    """Seconds and peak resident bytes of a process, which is killed beyond `seconds` or `size`."""
    start, peak, why = time.monotonic(), 0, ""
    before = processor()
    with (where / "out").open("w+") as out, (where / "err").open("w+") as err:
        process = subprocess.Popen(
            command, stdout=out, stderr=err, cwd=where, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            if busy(process.pid) > seconds or peak > size:
                why = f"killed at {busy(process.pid):.0f} s and {peak / 1e9:.1f} GB"
                process.kill()
            time.sleep(0.05)
        out.seek(0), err.seek(0)
        told = err.read().strip().splitlines()
        found = json.loads(out.read()) if process.returncode == 0 else []
    why = why or ("" if process.returncode == 0 else (told or ["no word"])[-1])
    rows = found if isinstance(found, list) else [found]
    return {"seconds": round(processor() - before, 1), "clock": round(time.monotonic() - start, 1), "peak": peak,
            "failed": why, "variants": len(rows)}  # fmt: skip


def processor() -> float:
    """Seconds of the processor that processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def busy(pid: int) -> float:
    """Seconds of the processor that a process took until now; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """The most bytes that a process had in memory until now; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def noted(file: Path, found: list[dict[str, Any]]) -> None:
    """Write rows into a file, in the place of older rows of the same recipe and backbone; other rows stay."""
    rows = {(r["recipe"], r["backbone"]): r for r in [*(json.loads(file.read_text()) if file.exists() else []), *found]}
    file.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of recipes")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--json", type=Path, help="rows are written into it one by one, others in it stay")
    options = parser.parse_args()
    found, bad = [], 0
    with tempfile.TemporaryDirectory() as place:
        where = Path(place)
        names = [n for n in recipe.names() if any(fnmatch(n, p) for p in options.patterns)]
        for name, title, more in runs(names, where):
            command = [sys.executable, "-W", "ignore", "-m", "trimtab", "cost", name, "--json", *more]
            row = watched(command, 2 * options.seconds, 2e9 * options.gigabytes, where)
            good = not row["failed"] and row["seconds"] < options.seconds and row["peak"] < 1e9 * options.gigabytes
            bad += not good
            found.append({"recipe": name, "backbone": title, **row})
            print(f"{name:36} {title:14} {row['variants']:3} variants {row['seconds']:6.1f} s ({row['clock']:.0f}) "
                  f"{row['peak'] / 1e9:5.2f} GB  {'' if good else row['failed'] or 'too much'}",
                  flush=True)  # fmt: skip
            if options.json:
                noted(options.json, found)
    print(
        f"{len(found)} counted, {bad} of them fail, or need {options.seconds:g} s or {options.gigabytes:g} GB or more"
    )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

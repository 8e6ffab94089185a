"""Ranks of all pairs of MS-COCO's test size, in blocks, on one thread: seconds, and memory beyond the embeddings.

    python benchmarks/retrieval.py [--pictures 5000] [--texts 25000] [--width 512] [--block-mib 256]

Random unit vectors. Memory is the process's largest resident set less that before ranking; the whole matrix of scores
would take 4 bytes a pair on its own. The ranks of some pictures are compared with those by sorting.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from torch.nn import functional as F

from trimtab.metrics import retrieval


def resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pictures", 5000), ("texts", 25000), ("width", 512), ("block-mib", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    owner = torch.arange(args.texts) * args.pictures // args.texts
    images = F.normalize(torch.randn(args.pictures, args.width, generator=generator), dim=1)
    texts = F.normalize(images[owner] + torch.randn(args.texts, args.width, generator=generator) * 0.3, dim=1)
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    ranks = retrieval.ranks_of_embeddings(images, texts, owner, block_bytes=args.block_mib << 20)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    memory = resident() - before
    for i in range(0, args.pictures, max(1, args.pictures // 20)):
        order = (images[i] @ texts.T).argsort(descending=True)
        assert int(ranks.image_to_text[i]) == int((owner[order] == i).nonzero()[0]), f"picture {i}"
    result = retrieval.both_ways(ranks)
    found = {
        "pictures": args.pictures,
        "texts": args.texts,
        "width": args.width,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "memory_mib": memory >> 20,
        "whole_matrix_mib": args.pictures * args.texts * 4 >> 20,
        "rsum": result["rsum"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

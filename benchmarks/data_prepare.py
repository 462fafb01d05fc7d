"""Rows per second, MB per second and peak memory of data preparation: cold, and from the cache. Run it by hand.

python benchmarks/data_prepare.py --mb 200                     with a small tokenizer that is trained here
python benchmarks/data_prepare.py --mb 200 --tokenizer FOLDER  with that of a model
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SYLLABLES = ("ba", "ke", "mi", "lo", "nu", "ra", "se", "ti", "vo", "zu", "pan", "der", "lin", "mot", "gus", "fel")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words(count: int = 4000) -> list[str]:
    """Made-up words, the same every time."""
    choice = random.Random(0)
    return ["".join(choice.choices(SYLLABLES, k=choice.randint(1, 4))) for _ in range(count)]


def write_rows(path: Path, megabytes: float, seed: int = 0) -> int:
    """A jsonl file of preference pairs of about that size. The number of rows."""
    choice, vocabulary, written, rows = random.Random(seed), words(), 0, 0
    texts = [" ".join(choice.choices(vocabulary, k=length)) for length in range(20, 220)]  # parts of all rows
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            prompt, chosen, rejected = (choice.choice(texts) for _ in range(3))
            row = {"prompt": f"{rows} {prompt}", "chosen": chosen, "rejected": f"{rejected} {rows}"}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def small_tokenizer() -> Any:
    """A byte-level BPE of 4000 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(words())] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def measure(path: Path, tokenizer_name: str, max_length: int) -> None:
    """Prepares the file in this process and prints what it took."""
    from transformers import AutoTokenizer

    from alignzoo.data.dataset import prepare
    from alignzoo.recipe import Data

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    before = _peak(resource.RUSAGE_SELF)
    data, said = Data(train=str(path), max_length=max_length, eval_fraction=0.01), list[str]()
    started = time.perf_counter()
    prepared = prepare(data, "pairs", tokenizer, needs_mismatched=True, seed=0, say=said.append)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    step = max(1, len(prepared.train) // 20_000)
    read = [prepared.train[i].tokens for i in range(0, len(prepared.train), step)]
    per_tree = (time.perf_counter() - started) / len(read)
    rows, size = prepared.report.sources[0].rows, path.stat().st_size / 1e6
    how = "cached" if any("from the cache" in line for line in said) else "cold"
    own, worker = _peak(resource.RUSAGE_SELF), _peak(resource.RUSAGE_CHILDREN)
    print(
        f"{how}: {rows:,} rows, {size:,.0f} MB in {seconds:.2f} s: {rows / seconds:,.0f} rows/s, "
        f"{size / seconds:.1f} MB/s; peak {own:.0f} MB ({before:.0f} MB before), {worker:.0f} MB in a worker; "
        f"a tree in {per_tree * 1e6:.0f} us"
    )


def _peak(who: int) -> float:
    return resource.getrusage(who).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=50.0, help="size of the generated file")
    parser.add_argument("--tokenizer", help="a folder or hub id")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # of a measuring process
    options = parser.parse_args()
    if options.file is not None:
        measure(options.file, options.tokenizer, options.max_length)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.mb)
        if options.tokenizer is None:  # trained once: no two trainings need give the same vocabulary
            small_tokenizer().save_pretrained(f"{folder}/tokenizer")
        more = ["--file", str(path), "--tokenizer", options.tokenizer or f"{folder}/tokenizer"]
        environment = {**os.environ, "ALIGNZOO_CACHE": f"{folder}/cache"}
        for _ in range(2):  # each in a process of its own: peak memory never falls
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *more], check=True, env=environment)


if __name__ == "__main__":
    main()

"""Loading and encoding beside what they cannot beat.

    python benchmarks/data.py [--pictures 128] [--repetitions 3]

- packing: how full rows of 4,096 tokens are, from sequences of 1 to 1,100 tokens.
- loading: packed tokens that one worker delivers in a second, from encoded shards whose captions all differ; three
  quarters of the tokens are codes.
- encoding: `encode` on JPEG files of 256 x 256 pixels with a VQGAN, beside a bare loop over the same tokenizer with the
  pictures decoded already; how many operations a picture takes is counted by torch.
- memory: what a process holds while it encodes a Parquet file of 200,000 rows in one row group, every eighth of them
  with a picture.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import ratio, settle, side_by_side
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from uni_x.data.collate import Collator
from uni_x.data.dataset import Source, TrainingStream, start_positions
from uni_x.data.encode import EncodeSummary, encode
from uni_x.data.packing import plan_rows
from uni_x.data.readers import open_source
from uni_x.data.render import Renderer, Vocabulary
from uni_x.data.schema import CodeGrid, Sample
from uni_x.data.shards import shard_to_bytes
from uni_x.data.text_tokenizer import special_ids, train_text_tokenizer
from uni_x.images import ImageTokenizer
from uni_x.recipe import PatchNetwork, RenderOptions, TokenizerConfig, VQGANNetwork

CODES, SIDE, MAX_LENGTH = 8192, 16, 4096
MEMORY_ROWS = 200_000


def measure_packing() -> None:
    lengths = np.random.default_rng(0).integers(1, 1101, 20_000).tolist()
    rows = plan_rows(lengths, MAX_LENGTH)
    print(f"\npacking: {sum(lengths) / (len(rows) * MAX_LENGTH):.4f} of {len(rows):,} rows of {MAX_LENGTH} is filled")


def measure_loading(folder: Path, repetitions: int) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 10))) for _ in range(5000)]
    shards = 20  # more than is loaded, so that no caption is seen twice
    captions = [" ".join(rng.choice(words, 58)) for _ in range(1000 * shards)]
    for shard in range(shards):
        samples = [
            Sample(
                f"{shard}-{number}",
                (CodeGrid(rng.integers(0, CODES, SIDE * SIDE).astype(np.uint16), SIDE, SIDE),),
                caption=captions[shard * 1000 + number],
            )
            for number in range(1000)
        ]
        (folder / f"part-00000-{shard:05d}.parquet").write_bytes(shard_to_bytes(samples, CODES))
    tokenizer = train_text_tokenizer(captions[:2000], 16_000)
    vocabulary = Vocabulary(len(tokenizer), CODES, **special_ids(tokenizer))
    renderer = Renderer(tokenizer, vocabulary, RenderOptions())
    collate = Collator(len(tokenizer) + CODES, vocabulary.pad_token_id)
    rates, shares = [], []
    for seed in range(repetitions):
        stream = TrainingStream(
            [Source(folder)], renderer, collate, MAX_LENGTH, 1, seed, position=start_positions(1, 1)[0]
        )
        loader = iter(DataLoader(stream, batch_size=None, num_workers=1))
        next(loader)
        started, tokens, codes = time.perf_counter(), 0, 0
        for batch in islice(loader, 1500):
            tokens += int(batch["attention_mask"].sum())
            codes += int((batch["input_ids"] >= len(tokenizer)).sum())
        rates.append(tokens / (time.perf_counter() - started))
        shares.append(codes / tokens)
        del loader
    print(f"\nloading: one worker delivers {statistics.median(rates):,.0f} tokens/s, {shares[0]:.2f} of them codes")


def measure_encoding(folder: Path, pictures: int, repetitions: int) -> None:
    network = VQGANNetwork(ch=32, ch_mult=(1, 2, 4), num_res_blocks=1, z_channels=64, embed_dim=64)
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TokenizerConfig(resolution=256, codebook_size=1024, network=network))
    rng = np.random.default_rng(0)
    for number in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((256, 256))
        coarse.save(folder / f"{number:05d}.jpg", quality=90)
        (folder / f"{number:05d}.txt").write_text(f"picture {number}")
    pixels = tokenizer.preprocess([Image.open(path) for path in sorted(folder.glob("*.jpg"))])
    with FlopCounterMode(display=False) as counter:
        tokenizer.encode_pixels(pixels[:1])
    runs = iter(range(10**6))
    size = tokenizer.pictures_at_once

    def bare() -> None:
        for start in range(0, pictures, size):
            tokenizer.encode_pixels(pixels[start : start + size])

    def ours() -> None:
        encode(open_source(str(folder)), tokenizer, folder.parent / f"out-{next(runs)}", source="pictures")

    seconds = side_by_side({"encode": ours, "bare loop": bare}, repetitions)
    print(f"\nencoding: {counter.get_total_flops() / 1e9:.1f} GFLOP a picture, {pictures} pictures, batches of {size}")
    for name, times in seconds.items():
        beside = "" if name == "bare loop" else f"   {ratio(times, seconds['bare loop'])} of the bare loop"
        print(f"  {name:<10} {pictures / statistics.median(times):6.1f} pictures/s{beside}")


def write_rows(path: Path) -> None:
    """Many rows in a Parquet file of one row group, every eighth with a small picture."""
    rng = np.random.default_rng(0)

    def row(number: int) -> dict[str, object]:
        if number % 8:
            return {"text": f"row {number} " * 20}
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "JPEG")
        return {"image": stream.getvalue(), "caption": f"picture {number}"}

    schema = pa.schema([("text", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
    table = pa.Table.from_pylist([row(number) for number in range(MEMORY_ROWS)], schema=schema)
    pq.write_table(table, path, row_group_size=MEMORY_ROWS)


def encode_many(source: Path) -> None:
    """Encodes a source of many rows, and prints what the process held on the way."""
    network = PatchNetwork(patch_size=8, embed_dim=4, encoder_sizes=(8,), decoder_sizes=(8,))
    tokenizer = ImageTokenizer(TokenizerConfig(resolution=16, codebook_size=64, network=network))
    held: list[int] = []

    def report(summary: EncodeSummary) -> None:
        if summary.read >= MEMORY_ROWS // 20 * (len(held) + 1):
            lines = Path("/proc/self/status").read_text().splitlines()
            held.append(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024)

    encode(open_source(str(source)), tokenizer, source.parent / "out", source="rows", progress=report)
    print(" ".join(map(str, held)))


def measure_memory(folder: Path) -> None:
    if not Path("/proc/self/status").exists():
        return
    source = folder / "rows.parquet"
    write_rows(source)
    size = pq.read_metadata(source).row_group(0).total_byte_size
    command = [sys.executable, __file__, "--encode-many", str(source)]
    held = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    print(
        f"\nmemory: encoding a Parquet file of {MEMORY_ROWS:,} rows and {size / 1e6:.0f} MB in one row group, in MB at "
        f"every twentieth of the way: {' '.join(held)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--encode-many", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encode_many:
        encode_many(options.encode_many)
        return
    with tempfile.TemporaryDirectory() as temporary:
        settle()
        measure_packing()
        (loading := Path(temporary) / "shards").mkdir()
        measure_loading(loading, options.repetitions)
        (encoding := Path(temporary) / "pictures").mkdir()
        measure_encoding(encoding, options.pictures, options.repetitions)
        measure_memory(Path(temporary))


if __name__ == "__main__":
    main()

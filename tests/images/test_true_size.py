"""The image tokenizer of the Chameleon release at its true size, with random weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import uni_x
from uni_x.images.tokenizer import build_network
from uni_x.recipe import TokenizerConfig, VQGANNetwork

SIZES = {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "z_channels": 256}
MEGABYTES = 1400  # what docs/models.md states, and some room for other versions of libraries

ENCODE_AND_DECODE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from uni_x.images import ImageTokenizer

tokenizer = ImageTokenizer.from_pretrained(sys.argv[1])
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 700, 3), dtype=np.uint8))
codes = tokenizer.encode([picture, picture])
assert codes.shape == (2, 32, 32) and (codes[0] == codes[1]).all() and 0 <= codes.min() and codes.max() < 8192
assert tokenizer.decode(codes[:1])[0].size == (512, 512)
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process's memory")
def test_the_release_at_its_true_size_keeps_to_the_memory_that_the_guide_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = VQGANNetwork(**(SIZES | {"embed_dim": 256}))
    weights = build_network(TokenizerConfig(resolution=512, codebook_size=8192, network=network)).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "vqgan.ckpt")
    params = {"embed_dim": 256, "n_embed": 8192, "ddconfig": {**SIZES, "resolution": 512, "double_z": False}}
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    command = [sys.executable, "-c", ENCODE_AND_DECODE, str(tmp_path)]
    run = subprocess.run(command, cwd=Path(uni_x.__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) / 1024 < MEGABYTES

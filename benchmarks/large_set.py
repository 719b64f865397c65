"""Fine-tuning on a sensitive set that is larger than the memory that the process may use.

    python benchmarks/large_set.py [--gib 6] [--limit 2] [--batch 8]

Makes a folder of JPEGs of 256x256 pixels, whose decoded set has `--gib` GiB, and fine-tunes on it twice:
within `--limit` GiB of memory (RLIMIT_DATA, which counts all memory of a process but files that are mapped),
reading images from their file, and without a limit with all images in memory. Prints times and peaks; the
status is 1 unless the weights are equal to the bit. Files are links to a few different ones.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from privimage.distributed import checkpoint

SIDE, DIFFERENT = 256, 64
SETTINGS = """
method: dpdm
run: {dir: run}
data:
  resolution: 256
  public: {kind: glyphs}
  sensitive: {kind: folder, path: SET, labelled: false}
privacy: {epsilon: 10, delta: 1.0e-6, accountant: rdp, insecure_fixed_key: 1, ledger: LEDGERS}
model: {width: 8, multipliers: [1, 1, 1, 1], attention: [32]}
finetune: {logical_batch_size: BATCH, physical_batch_size: 1, steps: 3, noise_copies: 1, max_grad_norm: 0.01,
  learning_rate: 3.0e-4}
# Everything is stated: measurements, by which the rules choose, need more memory than there is.
query: {network: resnet-small, batch_size: 8, steps: 1, learning_rate: 0.01}
select: {per_image: 1, per_class: 1, max_rise: 0.005}
pretrain: {batch_size: 8, steps: 1, learning_rate: 1.0e-4}
synthesize: {samples: 8}
evaluate: {cnn_epochs: 1, cnn_batch_size: 8, fidelity_samples: 10, before: false}
runtime: {device: cpu, threads: 1}
"""


def make_set(root: Path, count: int) -> None:
    """`count` JPEGs in one folder."""
    rng = np.random.default_rng(0)
    (root / "different").mkdir(parents=True)
    (root / "set").mkdir()
    for number in range(DIFFERENT):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((SIDE, SIDE), 3)
        coarse.save(root / "different" / f"{number}.jpg", quality=90)
    for number in range(count):
        os.link(root / "different" / f"{number % DIFFERENT}.jpg", root / "set" / f"{number:06d}.jpg")


def finetuned(
    root: Path, name: str, batch: int, limit: float | None, residence: str
) -> tuple[float, int, dict]:
    """Seconds, the peak of resident memory in bytes, and the weights."""
    config = root / f"{name}.yaml"
    ledgers = str(root / f"ledgers-{name}")
    settings = SETTINGS.replace("SET", str(root / "set")).replace("LEDGERS", ledgers)
    config.write_text(settings.replace("BATCH", str(batch)))
    command = [Path(sys.executable).with_name("privimage"), "finetune", config, f"run.dir={root / name}"]

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 2**30),) * 2)

    started = time.monotonic()
    process = subprocess.Popen(
        [*command, f"data.sensitive.residence={residence}"],
        preexec_fn=limited,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors[-3000:])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    state = checkpoint.load(root / name / "finetune" / "weights.pt")
    assert state is not None
    return time.monotonic() - started, peak, state["ema"]


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=6.0)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=8, help="images of a private step, expected")
    given = parser.parse_args()
    count = int(given.gib * 2**30 / (3 * SIDE * SIDE))
    root = Path(tempfile.mkdtemp(prefix="privimage-large-"))
    try:
        make_set(root, count)
        print(f"{count} images of {SIDE}x{SIDE}, {given.gib:g} GiB when decoded")
        seconds, peak, small = finetuned(root, "limited", given.batch, given.limit, "disk")
        print(f"limit {given.limit:g} GiB, from the file: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
        seconds, peak, large = finetuned(root, "unlimited", given.batch, None, "host")
        print(f"no limit, in memory: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
        equal = all(torch.equal(small[name], large[name]) for name in large)
        print(f"weights are {'equal to the bit' if equal else 'DIFFERENT'}")
        return 0 if equal else 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

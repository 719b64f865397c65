"""The public set from JPEGs of full size to a store, by several ranks: speed, memory, and kills on the way.

    python benchmarks/prepare.py [--images 100000] [--kills 10] [--ranks 2]

Makes a folder of JPEGs as large as those of ImageNet (about 500x375 pixels, 100 KB), prepares it undisturbed,
and once more while ranks and decoding processes are killed at random moments and the whole is stopped by USR2
once. The stores must be equal byte for byte, and no process may be left. Files are links to a few hundred
different ones, so the disk has no part in what is measured. Prints a table; the status is 1 where something
differs.
"""

import argparse
import hashlib
import io
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HOME = Path(__file__).resolve().parent.parent
CLASSES, DIFFERENT = 100, 400
CONFIG = """
method: pdp-diffusion
run: {dir: run}
data:
  resolution: 32
  public: {kind: folder, path: PATH}
  sensitive: {kind: digits}
runtime: {device: cpu, threads: 1}
"""
MARK = "PRIVIMAGE_TRIAL"


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG with large shapes and fine texture, about as long as a photograph's."""
    width, height = int(rng.integers(400, 600)), int(rng.integers(300, 500))
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height), 3)
    texture = rng.normal(0, 12, (height, width, 1))
    pixels = np.clip(np.asarray(coarse) + texture, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=85)
    return buffer.getvalue()


def make_folder(root: Path, count: int) -> float:
    """`count` JPEGs in CLASSES folders; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    (root / "different").mkdir(parents=True)
    sizes = []
    for number in range(min(DIFFERENT, count)):
        data = photograph(rng)
        sizes.append(len(data))
        (root / "different" / f"{number}.jpg").write_bytes(data)
    which = rng.integers(0, len(sizes), count)
    for number in range(count):
        place = root / "set" / f"class{number % CLASSES:03d}"
        place.mkdir(parents=True, exist_ok=True)
        os.link(root / "different" / f"{which[number]}.jpg", place / f"{number:07d}.jpg")
    return float(np.mean(sizes))


class Preparation:
    """`privimage prepare` under torchrun, which starts the ranks again when one of them dies."""

    def __init__(self, folder: Path, config: Path, ranks: int):
        self.folder, self.token = folder, secrets.token_hex(8)
        env = os.environ | {MARK: self.token, "RANKS": str(ranks), "RESTARTS": "100", "PATH": _path()}
        command = [HOME / "launchers" / "torchrun.sh", "prepare", config, f"run.dir={folder}"]
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def processes(self) -> dict[int, list[str]]:
        """All that it has started: process ids and command lines."""
        mark, found = f"{MARK}={self.token}".encode(), {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
        return found

    def of(self, kind: str) -> list[int]:
        """Process ids of its ranks, or of its decoders."""
        if kind == "a rank":
            return [
                pid
                for pid, words in self.processes().items()
                if words[1:2] and words[1].endswith("/privimage")
            ]
        servers = {
            pid for pid, words in self.processes().items() if "multiprocessing.forkserver" in " ".join(words)
        }
        return [pid for pid in servers if _parent(pid) in servers]  # the server itself decodes nothing

    @property
    def memory(self) -> int:
        """Bytes that its processes have to themselves at this moment."""
        total = 0
        for pid in self.processes():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return total


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def undisturbed(folder: Path, config: Path, ranks: int) -> tuple[float, int]:
    """Seconds of decoding and writing, without the start of the ranks; and the peak of memory in bytes."""
    started, peak = 0.0, 0
    running = Preparation(folder, config, ranks)
    while running.process.poll() is None:
        if not started and running.of("a decoder"):
            started = time.monotonic()
        peak = max(peak, running.memory)
        time.sleep(0.2)
    if running.process.returncode:
        raise SystemExit(running.log.read_text())
    return time.monotonic() - started, peak


def disturbed(folder: Path, config: Path, ranks: int, kills: int, seconds: float, seed: int) -> list[str]:
    """Prepare with kills; returns what was done and what followed."""
    rng, done = random.Random(seed), []
    running = Preparation(folder, config, ranks)
    for number in range(kills):
        # Not before there is something to disturb: until then it is torchrun itself that a signal ends.
        while not running.of("a decoder") and running.process.poll() is None:
            time.sleep(0.1)
        time.sleep(rng.uniform(0.2, 1.0) * seconds / (kills + 1))
        if running.process.poll() == 0:
            break
        started = time.monotonic()
        if number == kills // 2:
            os.kill(running.process.pid, signal.SIGUSR2)
            status = running.process.wait()
            done.append(f"USR2: ended with status {status} in {time.monotonic() - started:.1f} s")
        else:
            what = rng.choice(("a decoder", "a rank"))
            victims, old = running.of(what), set(running.of("a rank"))
            for pid in rng.sample(victims, min(1, len(victims))):
                os.kill(pid, signal.SIGKILL)
            # Torchrun starts all ranks again; a killed decoder ends the run with a line, to be run again.
            while (what == "a decoder" or set(running.of("a rank")) & old) and running.process.poll() is None:
                time.sleep(0.1)
            before = parts(folder)
            while parts(folder) <= before and running.process.poll() is None:
                time.sleep(0.1)
            ended = running.process.poll()
            how = "went on by itself" if ended is None else f"ended with status {ended}"
            done.append(f"killed {what}: {how} after {time.monotonic() - started:.1f} s")
        if running.process.poll():
            done += left_by(running)
            running = Preparation(folder, config, ranks)
    if running.process.wait():
        running = Preparation(folder, config, ranks)
        running.process.wait()
    return done + left_by(running)


def parts(folder: Path) -> int:
    """How many parts of the set are decoded; many once it is whole."""
    place = folder / "prepare"
    if (place / "done.json").exists():
        return 1 << 30
    return len(list(place.glob(".public.*.parts/*.npz"))) if place.exists() else 0


def left_by(running: Preparation) -> list[str]:
    """A line for processes that are still there ten seconds after their launcher has ended."""
    deadline = time.monotonic() + 10
    while (left := running.processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [f"LEFT: {sorted(left)}"] if left else []


def digest(folder: Path) -> str:
    """SHA-256 of the store that a preparation has made."""
    (store,) = [
        path for path in (folder / "prepare").iterdir() if path.name in ("public.beton", "public.npy")
    ]
    with store.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Run the trial and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="privimage-prepare-"))
    try:
        mean = make_folder(root, given.images)
        config = root / "config.yaml"
        config.write_text(CONFIG.replace("PATH", str(root / "set")))
        seconds, peak = undisturbed(root / "undisturbed", config, given.ranks)
        rate = given.images / seconds
        print(f"{given.images} JPEGs of {mean / 1000:.0f} KB on average, {given.ranks} ranks")
        print(f"undisturbed: {seconds:.0f} s, {rate:.0f} images/s, peak {peak / 2**20:.0f} MiB")
        print(f"1.28 million at that rate: {1.28e6 / rate / 3600:.2f} h")
        done = disturbed(root / "disturbed", config, given.ranks, given.kills, seconds, given.seed)
        for line in done:
            print(f"  {line}")
        same = digest(root / "undisturbed") == digest(root / "disturbed")
        print(f"stores are {'equal byte for byte' if same else 'DIFFERENT'}")
        return 0 if same and not any("LEFT" in line for line in done) else 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

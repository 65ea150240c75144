"""Memory of extraction, kNN and probe does not depend on the number of images, beside their features on disk."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading, time
import torch
from pathlib import Path
from sslfast.evaluation import linear_probe
from sslfast.evaluation.cache import FeatureCache, table_of
from sslfast.evaluation.knn import nearest_neighbours

def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

torch.set_num_threads(1)
linear_probe.BLOCK_BYTES = 1 << 22
threading.Thread(target=watch, daemon=True).start()
generator = torch.Generator().manual_seed(0)
centres = torch.randn(4, 128, generator=generator)
for kind in ("extraction and kNN", "probe"):
    for count in (4_000, 4_000, 80_000):  # the first one also loads libraries and warms the allocator
        labels = torch.arange(count) % 4
        cache = FeatureCache(Path(sys.argv[1]) / kind)
        peak = 0
        writer = cache.writer({"n": count})
        for first in range(0, count, 256):
            some = labels[first : first + 256]
            writer.append(centres[some] + torch.randn(len(some), 128, generator=generator))
        writer.commit(table_of({"n": count}, torch.arange(count), []))
        values = cache.load({"n": count}).values
        assert values.shape == (count, 128)
        if kind == "probe":
            probe = linear_probe.train_probe(values, labels, classes=4, strengths=[1.0])
            assert linear_probe.probe_scores(probe, values, labels, classes=4)[0] > 0.9
        else:
            _, rows = nearest_neighbours(values[:20], values, 3, max_entries=1 << 17)
            assert rows[:, 0].tolist() == list(range(20))
        print(peak)
"""


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """Twenty times the images: 2 MB and 41 MB of features, in float64 4 MB and 82 MB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) for line in done.stdout.splitlines()]
    for kind, small, large in (("extraction and kNN", *peaks[1:3]), ("probe", *peaks[4:])):
        assert large < small + 20_000_000, (kind, peaks)

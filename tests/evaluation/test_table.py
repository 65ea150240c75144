import os
from pathlib import Path
from typing import Any

import pytest

from sslfast.cli.main import main
from sslfast.evaluation.table import accuracy_table, detection_table, layer_table, precision_table
from tests.evaluation.runs import write_data, write_run

NAMES = ["[/b]", "[red]x[/red]", "[link=http://x]", "a\x1b[31m\nb", "\udce9t"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str) -> None:
    numbers = dict.fromkeys(
        ("top1", "top5", "top1_standard_error", "top5_standard_error", "mAP", "ap", "ap50", "ap75", "voc07_ap",
         "voc07_ap50", "voc07_ap75", "voc07_detectron2_ap", "voc07_detectron2_ap50", "voc07_detectron2_ap75"), 0.5,
    )  # fmt: skip
    row = {"encoder": name, "protocol": f"p-{name}", "layer": name, **numbers}
    images = {"images": 3}
    result: dict[str, Any] = {"protocol": "p", "seeds": [0], "results": [row], "data": {"classes": 2, "train": images}}
    result["data"]["val"] = images
    shown = name.replace("\x1b", r"\x1b").replace("\n", r"\n").replace("\udce9", r"\xe9")
    for table in (accuracy_table, layer_table, precision_table, detection_table):
        assert shown in table(result)
    result["protocol"] = name
    assert shown in accuracy_table(result)


def test_names_that_are_not_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9"))
    data, run = write_data(folder / "data", train=5, val=1), write_run(folder / "run")
    for split in ("train", "val"):
        (data / split / "red").rename(data / split / "r\udce9d")
    options = [str(run), str(data), "--device", "cpu"]
    assert main(["evaluate", "knn", *options, "--k", "1"]) == 0
    assert main(["evaluate", "linear", *options]) == 0
    assert main(["neighbours", *options, "--k", "2", "-o", str(folder / "n.png")]) == 0
    assert main(["report", str(run), "--data", str(data), "--device", "cpu", "-o", str(folder / "r.html")]) == 0
    assert r"r\xe9d" in (folder / "r.html").read_text("utf-8")
    found = capfd.readouterr()
    assert "Traceback" not in found.err
    assert (run / "evaluation" / "knn.json").exists()

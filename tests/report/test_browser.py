"""The report in Chromium, driven over WebDriver: it draws, answers the pointer, fits a phone, follows dark mode."""

import base64
import io
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sslfast.report.build import ReportConfig, report
from tests.report.test_build import make_run, write_folder
from tests.report.test_hostile import HOSTILE, hostile_run

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--window-size=1200,1300"]  # fmt: skip


class Browser:
    """The few WebDriver calls that are needed (W3C WebDriver, and Chromium's own for devices and media)."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        self.base += f"/session/{self._post('/session', {'capabilities': capabilities})['sessionId']}"

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, path: Path) -> None:
        self._post("/url", {"url": path.resolve().as_uri()})

    def run(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def move_to(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y), "origin": "viewport"}
        self._post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def screenshot(self) -> Image.Image:
        shot = self.devtools("Page.captureScreenshot", format="png")["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")

    def close(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self.base, method="DELETE"), timeout=30).close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = shutil.which("chromedriver")
    assert driver is not None, "no chromedriver; apt-get install -y chromium chromium-driver"
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = None
    try:
        for _ in range(100):
            try:
                found = Browser(port, tmp_path_factory.mktemp("profile"))
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        assert found is not None, "chromedriver did not answer"
        yield found
    finally:
        if found is not None:
            found.close()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Browser:
    folder = tmp_path_factory.mktemp("page")
    data = write_folder(folder / "data")
    browser.open(
        report((make_run(folder / "run"),), ReportConfig(points=15, queries=3), output=folder / "r.html", data=data)
    )
    assert browser.run("return document.documentElement.dataset.ready") == "yes"
    return browser


def test_hovering_a_curve_shows_its_values(opened: Browser) -> None:
    box = opened.run(
        "const s=document.querySelector('figure[data-kind=lines] svg');s.scrollIntoView({block:'center'});"
        "const r=s.getBoundingClientRect();return [r.left,r.top,r.width,r.height]"
    )
    assert opened.run("return document.querySelector('.tip').hidden") is True
    opened.move_to(box[0] + box[2] - 15, box[1] + box[3] / 2)
    assert opened.run("return document.querySelector('.tip').hidden") is False
    text = opened.run("return document.querySelector('.tip').innerText")
    assert text.split() == ["2", "run:", "0.1389"]  # epoch 2, loss 5 / 36


def test_hovering_a_dot_shows_its_image(opened: Browser) -> None:
    where = opened.run(
        "const f=document.querySelector('figure[data-kind=map]'),c=f.querySelector('canvas');"
        "c.scrollIntoView({block:'center'});const d=JSON.parse(f.querySelector('script').textContent),"
        "r=c.getBoundingClientRect(),p=d.points[4];"
        "return [r.left+(0.03+0.94*p[0])*r.width,r.top+(0.03+0.94*p[1])*r.height]"
    )
    opened.move_to(*where)
    chosen = int(opened.run("return document.querySelector('figure[data-kind=map]').dataset.chosen"))
    name, sprite = opened.run(
        "const f=document.querySelector('figure[data-kind=map]');"
        "return [f.querySelector('.words').textContent,f.querySelector('.thumb').style.backgroundImage.slice(0,15)]"
    )
    assert 0 <= chosen < 15
    assert name.endswith(".png")
    assert sprite == 'url("data:image'


def test_layout_on_a_phone(opened: Browser) -> None:
    opened.devtools("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    try:
        wide = opened.run("return document.documentElement.scrollWidth")
        assert wide <= 360, f"the page is {wide} pixels wide on a screen of 360"
        outside = opened.run(
            "return [...document.querySelectorAll('main *')].filter(e=>e.getBoundingClientRect().right>361&&"
            "!e.closest('.wide')&&!e.closest('svg')).map(e=>e.outerHTML.slice(0,80))"
        )
        assert outside == []
    finally:
        opened.devtools("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_light_and_dark(opened: Browser, scheme: str, is_dark: bool) -> None:
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.devtools("Emulation.setEmulatedMedia", features=media)
    try:
        opened.run("window.scrollTo(0, 0)")
        paper = opened.screenshot().getpixel((2, 2))
        assert isinstance(paper, tuple)
        assert (sum(paper) / 3 < 60) == is_dark
        colours = opened.run(
            "const luminance=c=>{const v=c.match(/[0-9.]+/g).slice(0,3).map(x=>{x/=255;"
            "return x<=0.03928?x/12.92:((x+0.055)/1.055)**2.4});return 0.2126*v[0]+0.7152*v[1]+0.0722*v[2]};"
            "const back=luminance(getComputedStyle(document.body).backgroundColor);"
            "return [...document.querySelectorAll('h1,h2,p,td,th,.faint,small')].map(e=>{"
            "const l=luminance(getComputedStyle(e).color);"
            "return (Math.max(l,back)+0.05)/(Math.min(l,back)+0.05)}).reduce((a,b)=>Math.min(a,b))"
        )
        assert colours >= 4.5  # WCAG 2 contrast of every text
    finally:
        opened.devtools("Emulation.setEmulatedMedia", features=[])


def test_no_request_and_no_error(opened: Browser) -> None:
    entries = opened.run("return performance.getEntriesByType('resource').map(e=>e.name.slice(0,10))")
    assert all(name.startswith("data:") for name in entries)
    broken = opened.run("return [...document.images].filter(i=>!i.complete||!i.naturalWidth).length")
    assert broken == 0


def test_no_name_runs_as_a_script(browser: Browser, tmp_path: Path) -> None:
    runs = tuple(hostile_run(tmp_path / "runs", name) for name in HOSTILE)
    browser.open(report(runs, output=tmp_path / "r.html"))
    assert browser.run("return document.documentElement.dataset.ready") == "yes"
    assert browser.run("return document.title").startswith("sslfast: ")
    assert browser.run("return document.querySelectorAll('script:not([type])').length") == 1
    assert browser.run("return document.querySelectorAll('[onload],[onerror]').length") == 0
    assert "Published results on ImageNet" in browser.run("return document.body.innerText")

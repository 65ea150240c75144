"""A run of several machines, each a network namespace of this one: one that dies, a link that stalls, the way back.

    python -m benchmarks.studies.hosts --hosts 2 3 -o OUT [--seconds 20]

Needs root and iproute2. Every host has an address of its own behind a bridge and runs torchrun with one process; all
share the disk. ``--seconds`` is ``--rank-timeout``; stalls are links that are set down, so no packet comes and no
connection is closed. Writes OUT/hosts.json and prints a table. Delay and loss are added with ``--netem 'delay 20ms loss
1%'`` where the kernel has that queueing discipline.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BRIDGE, NETWORK = "sslfast-br", "10.77.0"


def ip(*arguments: str, inside: str | None = None) -> None:
    namespace = [] if inside is None else ["netns", "exec", inside, "ip"]
    subprocess.run(["ip", *namespace, *arguments], check=True)


@contextmanager
def network(hosts: int, netem: str) -> Iterator[list[str]]:
    """Namespaces ``sslfast-0`` and so on, with addresses 10.77.0.1 and so on, behind one bridge."""
    names = [f"sslfast-{host}" for host in range(hosts)]
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    made: list[str] = []
    try:
        for host, name in enumerate(names):
            ip("netns", "add", name)
            made.append(name)
            outer = f"ssl-{host}"
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", outer, "master", BRIDGE, "up")
            ip("address", "add", f"{NETWORK}.{host + 1}/24", "dev", "eth0", inside=name)
            for device in ("lo", "eth0"):
                ip("link", "set", device, "up", inside=name)
            if netem:
                subprocess.run(["tc", "qdisc", "add", "dev", outer, "root", "netem", *netem.split()], check=True)
        yield names
    finally:
        for host, name in enumerate(made):
            kill_all(name)
            subprocess.run(["ip", "link", "delete", f"ssl-{host}"], check=False)
            subprocess.run(["ip", "netns", "delete", name], check=False)
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def kill_all(name: str) -> None:
    """Every process of a host."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
    for pid in found.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def launch(names: list[str], run: Path, *options: str) -> list[subprocess.Popen[str]]:
    """torchrun with one process in each namespace."""
    small = [
        "synthetic:512", "--recipe", "pirl-small", "--epochs", "3",
        "--model.name", "resnet18", "--model.width", "0.125", "--method.num-negatives", "64",
        "--method.image-view.crop.size", "32", "--batch-size", "30", "--sync-batchnorm",
        "--log-every-steps", "1", "--checkpoint-every-steps", "8", "--progress", "off", "--no-tensorboard",
        "--loader.workers", "0", "--device", "cpu", "--precision", "fp32",
    ]  # fmt: skip
    found = []
    for host, name in enumerate(names):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(names)),
            "--node-rank", str(host), "--nproc-per-node", "1", "--master-addr", f"{NETWORK}.1",
            "--master-port", "29511", "-m", "sslfast", "pretrain", *small, "--output", str(run), *options,
        ]  # fmt: skip
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        with open(f"{run}.{host}.log", "a") as log:
            found.append(
                subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment, start_new_session=True)
            )
    return found


def losses(run: Path) -> list[float]:
    """Of every step on record."""
    log = run / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []


def wait_for_step(run: Path, step: int, within: float) -> None:
    end = time.monotonic() + within
    while len(losses(run)) < step:
        if time.monotonic() > end:
            raise SystemExit(f"{run} did not reach step {step} in {within:.0f} s: see {run}.*.log")
        time.sleep(0.1)


def finish(started: list[subprocess.Popen[str]], within: float) -> list[int | None]:
    """Exit codes; None for a host that did not end in time."""
    end = time.monotonic() + within
    codes: list[int | None] = []
    for process in started:
        try:
            codes.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
    return codes


def event(name: str, hosts: int, folder: Path, seconds: float, netem: str) -> dict[str, object]:
    """One run that is disturbed at step 20, and the same command again."""
    run = folder / f"{name.replace(' ', '-')}-{hosts}"
    limits = ("--rank-timeout", f"{seconds:g}", "--loader.timeout", f"{seconds / 2:g}")
    with network(hosts, netem) as names:
        started = launch(names, run, *limits)
        if name != "undisturbed":
            wait_for_step(run, 20, 300)
            ip("link", "set", f"ssl-{hosts - 1}", "down")
        if name == "machine dies":
            kill_all(names[-1])
        began = time.monotonic()
        codes = finish(started, 600 if name == "undisturbed" else 4 * seconds)
        took = time.monotonic() - began
        if name == "undisturbed" and codes != [0] * hosts:
            raise SystemExit(f"{run} ended with {codes}: see {run}.*.log")
    first_end = losses(run)
    if name != "undisturbed":
        with network(hosts, netem) as names:
            if finish(launch(names, run, *limits), 600) != [0] * hosts:
                raise SystemExit(f"{run} did not resume: see {run}.*.log")
    whole = losses(folder / f"undisturbed-{hosts}")
    return {
        "event": name, "hosts": hosts, "exit_codes": codes, "seconds_to_end": round(took, 1),
        "steps_at_end": len(first_end), "losses_of_all_steps_equal": losses(run) == whole,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--netem", default="")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if shutil.which("ip") is None or os.geteuid() != 0:
        raise SystemExit("hosts.py makes network namespaces: it needs root and iproute2's ip")
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for hosts in arguments.hosts:
        for name in ("undisturbed", "machine dies", "link stalls"):
            rows.append(event(name, hosts, arguments.output, arguments.seconds, arguments.netem))
            print(json.dumps(rows[-1]), flush=True)
    (arguments.output / "hosts.json").write_text(
        json.dumps({"settings": vars(arguments), "rows": rows}, default=str) + "\n"
    )


if __name__ == "__main__":
    main()

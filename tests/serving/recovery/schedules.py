"""Seeded schedules of faults, played against a chain under load.

`python -m tests.serving.recovery.schedules FIRST COUNT [FILE]` plays as many as are asked for, and
says what became of their requests, with a line of progress for each ten. FILE keeps a line for each
schedule as it ends; those that it has are not played again, so it may be interrupted.
"""

import json
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from fedsys.errors import RequestError, RuntimeFailure
from tests.serving.chains import images, model
from tests.serving.recovery.failing import continuing
from tests.waiting import came_true

NAMES = ("device", "edge", "cloud", "far")
REQUESTS = 24


def schedule(seed):
    """Return hosts of a chain, its cuts, and faults: moment, fault, host; each host is mended."""
    draw = random.Random(seed)
    names = NAMES[: draw.choice([3, 3, 4])]
    cuts = tuple(sorted(draw.choices(range(4), k=len(names) - 1)))
    faults, at = [], 0.0
    for _ in range(draw.randint(1, 4)):
        at += draw.choice([0.0, 0.01, 0.05, 0.15])
        fault = draw.choice(["kill", "kill", "kill", "pause", "restart"])
        faults.append((at, fault, draw.choice(names)))
    return names, cuts, faults


def strike(fleet, fault, name):
    """Do to a host what a schedule says."""
    if fault == "restart":
        fleet.kill(name)
        fleet.start(name)
    elif fault == "pause":
        fleet.pause(name)
        timer = threading.Timer(0.5, fleet.resume, (name,))
        timer.daemon = True
        timer.start()
    else:
        fleet.kill(name)


def play(seed, net, expected):
    """Play a schedule; return how many requests were issued, answered, refused, and wrong.

    Requests that are refused were told why: no host was left. All others must be answered, each by
    the scores of the whole model.
    """
    names, cuts, faults = schedule(seed)
    told, refused, wrong = [], [], []

    def ask(engine, number):
        try:
            answer = engine.answer(images(1, number))
        except (RequestError, RuntimeFailure) as error:
            (refused if "no host is left" in f"{error}" else wrong).append(f"{error}")
            return
        same = np.array_equal(answer.scores, expected[number])
        (told if same else wrong).append(number)

    with continuing(net, cuts, names=names) as (engine, fleet, continuer):
        threads = []
        began, left = time.monotonic(), list(faults)
        for number in range(REQUESTS):
            thread = threading.Thread(target=ask, args=(engine, number), daemon=True)
            thread.start()
            threads.append(thread)
            while left and left[0][0] <= time.monotonic() - began:
                _, fault, name = left.pop(0)
                if name in fleet.servers:
                    strike(fleet, fault, name)
            time.sleep(0.01)
        for thread in threads:
            thread.join(30)
        for name in names:  # and in the end all is as it was
            fleet.resume(name)
            if name not in fleet.servers:
                fleet.start(name)
        back = came_true(lambda: continuer.status()["technique"] == "none" and engine.ready)
        back = back and came_true(lambda: engine.partition.cuts == cuts)
    twice = len(told) - len(set(told))
    lost = REQUESTS - len(told) - len(refused) - len(wrong)
    return {"answered": len(told), "refused": len(refused), "wrong": wrong, "lost": lost,
            "twice": twice, "back": back}  # fmt: skip


def read(kept):
    """Return what became of the schedules that were played, by seed."""
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return {row.pop("seed"): row for row in rows}


def main():
    first, count = int(sys.argv[1]), int(sys.argv[2])
    kept = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    known = {} if kept is None or not kept.exists() else read(kept)
    torch.set_num_threads(1)
    net = model()
    with torch.inference_mode():
        expected = {number: net(images(1, number)) for number in range(REQUESTS)}
    total = {"answered": 0, "refused": 0, "lost": 0, "twice": 0, "wrong": 0, "not_back": 0}
    began, played = time.monotonic(), 0
    for seed in range(first, first + count):
        found = known.get(seed)
        if found is None:
            found, played = play(seed, net, expected), played + 1
            if kept is not None:
                with kept.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"seed": seed, **found}) + "\n")
        for key in ("answered", "refused", "lost", "twice"):
            total[key] += found[key]
        total["wrong"] += len(found["wrong"])
        total["not_back"] += not found["back"]
        if found["wrong"] or found["lost"] or found["twice"] or not found["back"]:
            print(json.dumps({"seed": seed, "schedule": schedule(seed), **found}), flush=True)
        if played and (seed - first + 1) % 10 == 0:
            done, each_s = seed - first + 1, (time.monotonic() - began) / played
            left = f"{done} of {count}, {each_s * (count - done):.0f} s left"
            print(left, total, file=sys.stderr, flush=True)
    print(json.dumps({"schedules": count, **total}))


if __name__ == "__main__":
    main()

import threading

import pytest

from fedsys.offload.processors import Processors, processor_quota, usable_cores
from tests.waiting import until

WAIT_S = 60.0


class Gauge:
    """Work that notes how many cores are in use at most, and in which order it was done."""

    def __init__(self):
        self._lock = threading.Lock()
        self.used = self.most = 0
        self.order, self.threads = [], set()

    def work(self, name, threads, hold):
        def done():
            with self._lock:
                self.used += threads
                self.most = max(self.most, self.used)
                self.order.append(name)
                self.threads.add(threading.get_ident())
            hold.wait(WAIT_S)
            with self._lock:
                self.used -= threads
            return name

        return done


def started(processors, gauge, names, threads, hold, got):
    """Begin to wait for turns in the order of names."""
    running = []
    for name in names:
        before = len(processors._waiting) + gauge.used
        thread = threading.Thread(
            target=lambda n=name: got.append(processors.do(gauge.work(n, threads, hold), threads))
        )
        thread.start()
        running.append(thread)
        until(lambda b=before: len(processors._waiting) + gauge.used > b)
    return running


@pytest.mark.parametrize(("cores", "threads", "at_once"), [(1, 1, 1), (3, 1, 3), (4, 2, 2)])
def test_no_more_cores_are_in_use_than_there_are(cores, threads, at_once):
    processors, gauge, hold, got = Processors(cores), Gauge(), threading.Event(), []
    running = started(processors, gauge, range(3 * at_once), threads, hold, got)
    assert gauge.most == gauge.used == at_once * threads
    hold.set()
    for thread in running:
        thread.join(WAIT_S)
    assert sorted(got) == list(range(3 * at_once))
    assert gauge.most == at_once * threads
    assert len(gauge.threads) <= cores


def test_who_came_first_is_served_first_and_a_large_piece_of_work_is_not_overtaken():
    processors, gauge, hold, got = Processors(2), Gauge(), threading.Event(), []
    running = started(processors, gauge, ["first"], 1, hold, got)
    second = threading.Thread(
        target=lambda: got.append(processors.do(gauge.work("large", 2, hold), 2))
    )
    second.start()
    until(lambda: len(processors._waiting) == 1)
    third = threading.Thread(
        target=lambda: got.append(processors.do(gauge.work("small", 1, hold), 1))
    )
    third.start()  # there is a core for it, but not before the large one
    until(lambda: len(processors._waiting) == 2)
    assert gauge.order == ["first"]
    hold.set()
    for thread in (*running, second, third):
        thread.join(WAIT_S)
    assert gauge.order == ["first", "large", "small"]


def test_more_threads_than_cores_count_as_all_of_them():
    assert Processors(2).do(lambda: 7, 16) == 7


def test_what_the_work_raises_is_raised_and_frees_the_core():
    processors = Processors(1)
    with pytest.raises(ZeroDivisionError):
        processors.do(lambda: 1 // 0, 1)
    assert processors.do(lambda: 7, 1) == 7


def test_a_machine_has_a_core():
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "2000 20000\n", "a/cpu.max": "max 100000\n"}, 0.1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, 1.5),
        (
            "4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "5000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "20000\n",
            },
            0.25,
        ),
        ("1:cpu:/outside\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/a\n", {}, None),
    ],
)
def test_a_quota_is_the_least_of_the_groups_around_a_process(tmp_path, groups, files, cores):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert processor_quota(tmp_path) == cores
    assert processor_quota(tmp_path / "nowhere") is None

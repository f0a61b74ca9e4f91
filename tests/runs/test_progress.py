import io
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsys.runs.lines import folded
from fedsys.runs.progress import (
    LineProgress,
    Progress,
    RichProgress,
    Silent,
    choose,
    clock_text,
    eta_seconds,
    round_line,
    seconds_text,
    summary_lines,
    table_head,
    table_row,
)

ROOT = Path(__file__).resolve().parents[2]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
ROW = {
    "round": 3,
    "val_accuracy": 0.9612,
    "val_loss": 0.13214,
    "train_loss": 0.221,
    "clients": 8,
    "seconds_round": 1.237,
    "bytes_up": 1000,
}
SUMMARY = {
    "accuracy": 0.9731,
    "val_accuracy": 0.969,
    "rounds": 10,
    "seconds": 12.34,
    "model_sha256": "ab12",
    "run_dir": "outputs/x",
}


class Ticks:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def on_a_terminal(show: Callable[[io.TextIOWrapper], None], columns: int = 100) -> str:
    """Return what `show` writes to a pseudo-terminal."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    read: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux: the other end is closed
                return
            if not piece:
                return
            read.append(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        with os.fdopen(theirs, "w", encoding="utf-8") as stream:
            show(stream)
    finally:
        thread.join()
        os.close(ours)
    return b"".join(read).decode()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


# --------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01"), (math.nan, "-:--")],
)
def test_a_duration_reads_like_a_clock(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0005, "0.5 ms"), (0.5, "0.50 s"), (9.996, "10.0 s"), (299.94, "299.9 s"), (301, "5:01")],
)
def test_a_duration_has_a_unit(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_there_is_no_eta_before_the_first_round() -> None:
    assert eta_seconds(rounds=10, done=0, spent=0.0, since=5.0) is None


def test_the_eta_is_the_mean_round_times_the_rounds_left_and_counts_down() -> None:
    assert eta_seconds(rounds=10, done=4, spent=8.0, since=0.0) == 12.0
    assert eta_seconds(rounds=10, done=4, spent=8.0, since=1.5) == 10.5
    assert eta_seconds(rounds=10, done=4, spent=8.0, since=500.0) == 10.0
    assert eta_seconds(rounds=10, done=10, spent=8.0, since=1.0) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ROW, "other"]),
        st.one_of(st.floats(), st.integers(0, 10**6), st.none(), st.text(max_size=5)),
    ),
    st.integers(1, 10**4),
)
def test_any_row_makes_one_line(row: dict[str, object], rounds: int) -> None:
    assert "\n" not in round_line(row, rounds, None)
    assert "\n" not in table_row(row, rounds)


@pytest.mark.parametrize("rounds", [1, 10, 1000])
def test_the_table_stands_below_its_head(rounds: int) -> None:
    row = ROW | {"round": rounds}
    assert len(table_row(row, rounds)) == len(table_head(rounds))
    assert len(table_row({"round": 1}, rounds)) == len(table_head(rounds))
    assert table_row(row, rounds).split() == [
        f"{rounds}/{rounds}",
        *["96.12%", "0.1321", "0.2210", "8", "1.24", "s"],
    ]


def test_a_line_is_folded_between_its_parts_where_they_are_short() -> None:
    """The unit of the last number stood on a line of its own."""
    text = "test accuracy 100.00%, test loss 0.0003, 3 rounds in 26.7 s"
    assert folded(text, 56).splitlines() == [
        "test accuracy 100.00%, test loss 0.0003,",
        "  3 rounds in 26.7 s",
    ]
    assert folded(text, 80) == text
    assert folded("a sentence that is longer than a line", 20).splitlines() == [
        "a sentence that is",
        "  longer than a line",
    ]


def test_the_summary_names_accuracy_time_and_place() -> None:
    assert summary_lines(SUMMARY) == [
        "test accuracy 97.31%, val accuracy 96.90%, 10 rounds in 12.3 s",
        "model   sha256 ab12",
        "results outputs/x",
    ]
    assert summary_lines({"rounds": 1}) == ["1 round"]
    assert summary_lines({"accuracy": math.nan}) == ["test accuracy nan"]
    assert summary_lines({}) == []


# --------------------------------------------------------------------------------------------------
# Choice


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose(json=False, stream=Terminal()), RichProgress)
    assert isinstance(choose(json=True, stream=Terminal()), RichProgress)
    assert isinstance(choose(json=False, stream=io.StringIO()), LineProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(json=False, stream=Terminal()), LineProgress)


def test_a_process_without_standard_error_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(choose(json=False), Silent)


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_the_summary_leaves_standard_output_to_the_json_object(
    make: Callable[[], io.StringIO],
) -> None:
    for json in (True, False):
        stream, out = make(), io.StringIO()
        with choose(json=json, stream=stream, out=out) as progress:
            play(progress)
        assert ("results outputs/x" in stream.getvalue()) == json
        assert out.getvalue() == ("" if json else "\n".join(summary_lines(SUMMARY)) + "\n")


# --------------------------------------------------------------------------------------------------
# Displays


def play(progress: Progress) -> None:
    with progress:
        progress.phase("loading [data]")
        progress.start(2, "train")
        progress.about("pi3 [clients 0 to 7]")
        progress.within("3 of 8 clients done")
        progress.phase("evaluate")
        progress.round_done({"round": 1, "val_accuracy": 0.5, "val_loss": math.nan})
        progress.note("client 3 [edge-a] was lost")
        progress.round_done({"round": 2, "val_accuracy": 0.75})
        progress.phase("drawing")
        progress.finish(SUMMARY)


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    play(Silent())
    assert capsys.readouterr() == ("", "")


def test_a_file_gets_one_plain_line_per_round() -> None:
    stream = io.StringIO()
    play(LineProgress(stream, clock=Ticks()))
    assert stream.getvalue().splitlines() == [
        "loading [data]",
        "train: 2 rounds",
        "pi3 [clients 0 to 7]",
        "round 1/2  val accuracy 50.00%  val loss nan  ETA 0:00",
        "client 3 [edge-a] was lost",
        "round 2/2  val accuracy 75.00%  ETA 0:00",
        "drawing",
        *summary_lines(SUMMARY),
    ]


def test_a_resumed_run_estimates_from_its_own_rounds() -> None:
    clock, stream = Ticks(), io.StringIO()
    progress = LineProgress(stream, clock=clock)
    progress.start(10, "train", done=8)
    clock.now += 30.0
    progress.round_done({"round": 9})
    assert stream.getvalue().splitlines() == [
        "train: 10 rounds, continued after round 8",
        "round  9/10  ETA 0:30",
    ]


def test_a_terminal_shows_a_bar_with_an_eta_and_a_line_per_round() -> None:
    clock = Ticks()

    def show(stream: io.TextIOWrapper) -> None:
        with RichProgress(stream, clock=clock) as progress:
            progress.start(10, "train [digits]")
            clock.now += 7.0
            progress.round_done(ROW | {"round": 1})
            progress.note("client 3 [edge-a] was lost")
            progress.phase("evaluate")
            progress._bars.refresh()  # rather than wait for its thread
            progress.finish(SUMMARY)

    text = on_a_terminal(show)
    lines = [line.rstrip() for line in visible(text).splitlines()]
    assert table_head(10) in lines
    assert table_row(ROW | {"round": 1}, 10).rstrip() in lines
    assert "client 3 [edge-a] was lost" in lines
    bars = [line for line in lines if "ETA" in line]
    assert any("train [digits] " in b and "━" in b and "0/10  0:00  ETA -:--" in b for b in bars)
    assert any("1/10  0:07  ETA 1:03 evaluate" in b for b in bars)
    assert [line for line in lines if line][-3:] == summary_lines(SUMMARY)
    assert text.rindex(SHOW) > text.rindex(HIDE)


@pytest.mark.parametrize("columns", [20, 60, 300])
def test_the_bar_stays_on_one_line_of_any_width(columns: int) -> None:
    def show(stream: io.TextIOWrapper) -> None:
        with RichProgress(stream) as progress:
            progress.start(10, "train " * 4)
            progress.phase("evaluate " * 3)
            progress._bars.refresh()

    text = on_a_terminal(show, columns)
    assert "\x1b[1A\x1b[2K\x1b[1A" not in text  # rich would go up once per line of the bar
    assert text.rindex(SHOW) > text.rindex(HIDE)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_eta_is_whole_and_nothing_wraps(columns: int) -> None:
    """At 80 columns the title of a run stood before the bar, and the ETA was cut off."""
    title = "cnn (38,330 parameters) on digits 1x8x8, 8 clients, FedAvg, seed 0"
    summary = SUMMARY | {"loss": 0.0783, "model_sha256": "3f" * 32}
    clock = Ticks()

    def show(stream: io.TextIOWrapper) -> None:
        with RichProgress(stream, clock=clock) as progress:
            progress.start(100, title)
            progress.about("policy fixed, schedule pipelined, 2 edge servers, link memory")
            clock.now += 3000.0
            progress.round_done(ROW | {"round": 1, "virtual_s": 3.5})
            progress.phase("scoring the test part, drawing plots")
            progress._bars.refresh()
            progress.finish(summary)

    lines = [line.rstrip() for line in visible(on_a_terminal(show, columns)).splitlines()]
    assert max(map(len, lines)) <= columns
    assert any("1/100  50:00  ETA 82:30:00" in line for line in lines)
    assert any("virtual" in line and "val accuracy" in line for line in lines)
    assert " ".join(" ".join(lines).split()).count(title) == 1


def test_columns_without_values_are_left_out_and_come_when_there_are_some() -> None:
    def show(stream: io.TextIOWrapper) -> None:
        with RichProgress(stream) as progress:
            progress.start(3)
            progress.round_done({"round": 1, "val_accuracy": 0.5})
            progress.round_done({"round": 2, "val_accuracy": 0.6})
            progress.round_done({"round": 3, "val_accuracy": 0.6, "train_loss": 1.0})

    lines = [line.split() for line in visible(on_a_terminal(show)).splitlines()]
    assert lines.count(["round", "val", "accuracy"]) == 1
    assert lines.count(["round", "val", "accuracy", "train", "loss"]) == 1


def test_a_long_round_says_how_far_it_is_and_a_short_one_does_not() -> None:
    clock, stream = Ticks(), io.StringIO()
    progress = LineProgress(stream, clock=clock)
    progress.start(2, "train")
    for second in range(75):
        clock.now += 1.0
        progress.within(f"{second} of 80 batches")
    progress.round_done({"round": 1})
    clock.now += 9.0
    progress.within("many batches")
    assert stream.getvalue().splitlines()[1:] == [
        "round 1/2 for 10.0 s: 9 of 80 batches",
        "round 1/2 for 40.0 s: 39 of 80 batches",
        "round 1/2 for 70.0 s: 69 of 80 batches",
        "round 1/2  ETA 1:15",
    ]


def test_a_long_round_says_beside_the_bar_how_far_it_is() -> None:
    clock = Ticks()

    def show(stream: io.TextIOWrapper) -> None:
        with RichProgress(stream, clock=clock) as progress:
            progress.start(10)
            progress.within("1 of 8 clients done")
            clock.now += 12.0
            progress.within("3 of 8 clients done")
            progress._bars.refresh()

    text = visible(on_a_terminal(show))
    assert "ETA -:-- 3 of 8 clients done" in text and "1 of 8" not in text


def test_an_error_gives_the_cursor_back() -> None:
    def show(stream: io.TextIOWrapper) -> None:
        with pytest.raises(ValueError, match="boom"), RichProgress(stream) as progress:
            progress.start(3)
            raise ValueError("boom")

    text = on_a_terminal(show)
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_ctrl_c_gives_the_cursor_back() -> None:
    code = (
        "import sys, signal\n"
        "from fedsys.runs.progress import choose\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    with choose(json=True) as progress:\n"
        "        progress.start(3)\n"
        "        print('ready', flush=True)\n"
        "        signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )

    def show(stream: io.TextIOWrapper) -> None:
        command = [sys.executable, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, cwd=ROOT) as child:
            assert child.stdout is not None
            # Standard output holds what the run printed, although the bar is on the terminal.
            assert child.stdout.readline() == b"ready\n"
            child.send_signal(signal.SIGINT)
            assert child.wait(timeout=60) == 130
            assert child.stdout.read() == b""

    text = on_a_terminal(show)
    assert "ETA" in text
    assert text.rindex(SHOW) > text.rindex(HIDE)


def test_importing_the_module_imports_no_display_library() -> None:
    code = "import sys, fedsys.runs.progress; assert not {'rich', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

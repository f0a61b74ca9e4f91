"""The ServerApp: one for all runtimes. What a run leaves behind is written here."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedsys import config as configuration
from fedsys import data
from fedsys.config import Config
from fedsys.data import Images
from fedsys.errors import extras_named, need
from fedsys.faults import out_of_reach
from fedsys.models import lora
from fedsys.models.resilient import ResilientModel
from fedsys.offload.fleet import Fleet
from fedsys.offload.opening import open_fleet
from fedsys.planning.workload import mini_batches
from fedsys.runs import decision_plots, decisions, mobility_plots, plots, resilience, trace_plots
from fedsys.runs import startup as stages
from fedsys.runs.decisions import OffloadDecision
from fedsys.runs.folder import default_path, state_sha256
from fedsys.runs.live.process import live_page
from fedsys.runs.progress import Progress, choose
from fedsys.runs.tracking import tracked
from fedsys.runtime.edge_processes import with_launched
from fedsys.runtime.grids import attentive, before_exit
from fedsys.runtime.relay import Relay
from fedsys.training import federation
from fedsys.training import plain as training
from fedsys.training.federation import Federation, layers_of
from fedsys.training.pulse import pulse
from fedsys.training.resilience import PathScores, measure
from fedsys.training.tasks import Task, task_of
from fedsys.transport import records
from strategies import PrivateRecords, PrivateRounds, Roster, budgeted, build, private, pruned
from strategies.around import find
from strategies.crash_safety import CrashSafety, opened
from strategies.decisions import decisions_of
from strategies.heading import (
    Plans,
    about_kernels,
    about_pieces,
    kernel_figures,
    surroundings,
    title,
)
from strategies.offload import Offload
from strategies.offload_figures import figures, moves, recoveries, traces
from strategies.offload_totals import in_words, move_in_words
from strategies.one_by_one import about_memory, one_by_one
from strategies.private_clients import drowned
from strategies.roster import gather
from strategies.rounds import RoundResult, play
from strategies.sampling import Sampled
from strategies.virtual_time import RoundClock, virtual_totals
from strategies.watching import watched

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the model that the run config describes and fill the run folder."""
    asked = configuration.from_run_config(context.run_config)
    with _display(asked, context) as progress, extras_named():
        if asked.run.plots:
            need("matplotlib", "run.plots=true")
        grid = own = attentive(grid)
        config, grid, roster = gather(asked, grid, context.run_config, progress.note)
        config = with_launched(config, context.run_config)
        stages.current().reached("nodes")
        path = Path(config.run.dir or default_path(outputs(), "train"))
        with opened(config, path, progress) as safety, open_fleet(config, safety.faults) as fleet:
            before_exit(own, lambda: safety.folder.fail(KeyboardInterrupt("the run was stopped")))
            with (
                live_page(config.dashboard, path, progress.note),
                tracked(config.tracker, config.text, safety.folder, safety.done, progress.note),
            ):
                result = _train(config, grid, roster, safety, progress, fleet)
            progress.finish(result)


def outputs() -> Path:
    """Return the folder for run folders, where the run does not name its own.

    It is ``outputs`` in the working directory of this process, which for a bare ``flwr run`` is
    that of the SuperLink. A SuperLink that runs as a service may not write there: then it is in
    Flower's own folder.
    """
    here = Path.cwd()
    if os.access(here, os.W_OK) and here != Path("/"):
        return here / "outputs"
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "outputs"


def _display(config: Config, context: Context) -> Progress:
    """Return what shows the run to whoever asked for it."""
    relayed = context.run_config.get("progress") == "relayed"
    return Relay() if relayed else choose(json=config.json)


def _train(
    config: Config,
    grid: Grid,
    roster: Roster,
    safety: CrashSafety,
    progress: Progress,
    fleet: Fleet | None,
) -> dict[str, Any]:
    folder = safety.folder
    started = time.perf_counter()
    job = _prepared(config, grid, roster, safety, progress, fleet)
    stages.current().rounds_begin()
    _announce(config, job, safety, progress, grid)
    virtual = _virtual(config, job.fed, job.strategy, folder.rounds())
    arrays = _rounds(config, grid, job, safety, progress, virtual)
    drawing = ", drawing plots" if config.run.plots else ""
    progress.phase(f"scoring the test part{drawing}")
    seconds = safety.seconds + time.perf_counter() - started
    modelled = None if virtual is None else virtual.last
    trace_plots.write(folder.path, traces(job.strategy), modelled, draw=config.run.plots)
    pruned.keep_masks(job.strategy, folder.path)
    virtual_figures = virtual_totals(folder.rounds())
    layer = find(job.strategy, budgeted.Budgeted)  # type: ignore[type-abstract]
    promised = budgeted.figures(layer)
    more = {**figures(job.strategy), **pruned.figures(job.strategy), **virtual_figures, **promised}
    more |= kernel_figures(config, job.fed.dataset)
    return _conclude(config, job.fed, safety, arrays, job.judge, more, seconds)


@dataclass(frozen=True)
class _Job:
    """What a run is made of when its first round begins.

    Attributes:
        fed: Data and the parts of the clients.
        model: As it was built.
        judge: Scores global models.
        strategy: With all that stands around it.
        initial: The global model before the next round.
        steps: Mini-batches of each client in a round.
    """

    fed: Federation
    model: nn.Module
    judge: Judge
    strategy: Sampled
    initial: ArrayRecord
    steps: Sequence[int]


def _prepared(
    config: Config,
    grid: Grid,
    roster: Roster,
    safety: CrashSafety,
    progress: Progress,
    fleet: Fleet | None,
) -> _Job:
    """Load the data, build the model, and put the strategy together; let its policy practise."""
    progress.phase(f"loading {config.data.get('source', 'data')}")
    fed = federation.federation(config)
    model = federation.trained_model(config, fed.dataset)
    federation.check_model(model, fed.dataset, config)
    training.set_threads(config.client.threads)
    device = training.pick_device(config.client.device)
    judge = Judge(model.to(device), fed, task_of(config))
    strategy = build(
        config, model, roster, fleet=fleet, dataset=fed.dataset,
        folder=safety.folder.path, say=progress.phase,
    )  # fmt: skip
    initial = safety.watch(strategy, records.to_record(lora.sent(model)))
    if find(strategy, Offload) is not None:
        from strategies.truncated_rounds import practise

        practise(strategy, grid, initial, config, fed.dataset)
    stages.current().reached("data and model")
    return _Job(fed, model, judge, strategy, initial, steps_of(config, fed))


def steps_of(config: Config, fed: Federation) -> list[int]:
    """Return the mini-batches of each client in a round."""
    size, epochs = config.client.batch_size, config.client.epochs
    return [epochs * len(mini_batches(len(part), size)) for part in fed.parts]


def _announce(
    config: Config, job: _Job, safety: CrashSafety, progress: Progress, grid: Grid
) -> None:
    """Say what is about to be done, and what will have no effect."""
    dataset = job.fed.dataset
    progress.start(config.rounds, title(config, job.model, dataset), safety.done)
    promised = private.about(find(job.strategy, PrivateRecords))
    nbytes = sum(len(array.data) for array in job.initial.values())
    kept = about_memory(config, grid, job.strategy, nbytes)
    pieces, kernels = about_pieces(config, job.model, dataset), about_kernels(config, dataset)
    for line in (*surroundings(config), *pieces, *kernels, *promised, *kept):
        progress.about(line)
    for line in out_of_reach(config.faults.list, job.steps):
        progress.note(line)
    if warned := private.unprotected(config, split=find(job.strategy, Offload) is not None):
        progress.note(warned)
    rounds = find(job.strategy, PrivateRounds)
    count = sum(parameter.numel() for parameter in job.model.parameters())
    if rounds is not None and (warned := drowned(config, rounds.noise, count)):
        progress.note(warned)


def _rounds(
    config: Config,
    grid: Grid,
    job: _Job,
    safety: CrashSafety,
    progress: Progress,
    virtual: RoundClock | None,
) -> ArrayRecord:
    """Play the rounds that are left, and return the global model after them."""
    plans = Plans(config, job.strategy, progress.about, safety.folder.path)

    def began(number: int, clients: Sequence[int]) -> None:
        pulse().begin(len(clients), sum(job.steps[client] for client in clients))
        plans.tell(number)

    teller = Teller(config, job.strategy, safety, progress, lambda: _decided(config, job, virtual))
    with watched(pulse(), progress):
        return play(
            job.strategy,
            grid,
            job.initial,
            first=safety.done + 1,
            last=config.rounds,
            elapsed_s=safety.seconds,
            timeout_s=config.runtime.timeout_s,
            judge=job.judge.validation,
            metric=config.task.measure.name,
            done=teller.tell,
            faults=safety.faults,
            timed=None if virtual is None else virtual.row,
            began=began,
            stopped=lambda reason: progress.note(f"the run ends here: {reason}"),
            adding=one_by_one(config, grid, job.strategy, [len(part) for part in job.fed.parts]),
        )


def _decided(config: Config, job: _Job, virtual: RoundClock | None) -> list[OffloadDecision]:
    """Return what was decided for each device in the last round; none where nothing is split.

    A model that trains as a whole need not be one that can be traced.
    """
    offload = find(job.strategy, Offload)
    if offload is None:
        return []
    dataset = job.fed.dataset
    layers = layers_of(config, dataset)
    return decisions_of(offload, config, layers, {} if virtual is None else virtual.devices)


def _virtual(
    config: Config, fed: Federation, strategy: Strategy, rows: Sequence[Mapping[str, Any]]
) -> RoundClock | None:
    """Return what knows the virtual time of a round; None if no fleet is modelled."""
    if not config.fleet.devices:
        return None
    dataset = fed.dataset
    return RoundClock(
        config,
        layers_of(config, dataset),
        [len(part) for part in fed.parts],
        find(strategy, Offload),
        virtual_totals(rows).get("virtual_s", 0.0),
        len(rows),
    )


_TOLD_OF_MOVES = ("round", "client", "source", "target", "how", "at", "pause_s", "bytes", "why")


class Teller:
    """Writes down each round, shows it, and keeps what the run can continue from.

    Args:
        config: The run.
        strategy: Whose recoveries and levels of pruning are told.
        safety: Keeps what the run can continue from, in the run's folder.
        progress: Shows the run.
        decided: Returns the decisions of the last round.
    """

    def __init__(
        self,
        config: Config,
        strategy: Strategy,
        safety: CrashSafety,
        progress: Progress,
        decided: Callable[[], Sequence[OffloadDecision]],
    ) -> None:
        self._config, self._strategy = config, strategy
        self._safety, self._progress = safety, progress
        self._told, self._moved = len(recoveries(strategy)), len(moves(strategy))
        self._decided = decided
        self._diverged = False

    def tell(self, result: RoundResult) -> None:
        """Take note of a finished round."""
        strategy, folder, progress = self._strategy, self._safety.folder, self._progress
        folder.add_round(result.row)
        decisions.write(folder.path, self._decided())
        progress.round_done(result.row)
        for client, reason in result.lost.items():
            folder.event("client_lost", client=client, round=result.number, reason=reason)
            progress.note(f"round {result.number}: client {client} was lost: {reason}")
        for entry in recoveries(strategy)[self._told :]:
            folder.event("recovery", **entry)
            progress.note(in_words(entry))
        self._told = len(recoveries(strategy))
        self._tell_divergence(result)
        self._tell_moves(moves(strategy)[self._moved :])
        if news := pruned.news(strategy):
            progress.note(news)
        pruned.keep_level(strategy, self._config, result.number, result.arrays, folder.path)
        self._safety.keep(result)
        stages.current().round_ended()

    def _tell_divergence(self, result: RoundResult) -> None:
        """Say once if a loss is no number any more: a later round cannot mend that."""
        for what in ("train_loss", "val_loss"):
            value = result.row.get(what)
            if isinstance(value, float) and not math.isfinite(value) and not self._diverged:
                self._diverged = True
                named = what.replace("_", " ").replace("val ", "validation ")
                event = {"round": result.number, "what": named, "value": str(value)}
                self._safety.folder.event("diverged", **event)
                begin = f"round {result.number}: the {named} is {value}: the model has diverged"
                lower = f"client.lr lower than {self._config.client.lr:g}"
                self._progress.note(f"{begin}; {lower}, or client.clip_norm, may help")

    def _tell_moves(self, made: Sequence[Mapping[str, Any]]) -> None:
        """Write moves down; say those that no plan had, but what links or policies made of them."""
        self._moved += len(made)
        for move in made:
            self._safety.folder.event("move", **{key: move[key] for key in _TOLD_OF_MOVES})
            if move["why"]:
                self._progress.note(move_in_words(move))


def _conclude(
    config: Config,
    fed: Federation,
    safety: CrashSafety,
    arrays: ArrayRecord,
    judge: Judge,
    more: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Score the last model once on the test part and write what a run leaves behind."""
    folder = safety.folder
    state = judge.whole(arrays)
    last: Mapping[str, Any] = folder.rounds()[-1]
    test = judge.test(arrays)
    paths = judge.paths(config.resilience.measured_units)
    state, parts = resilience.divided(state)
    metric = config.task.measure.name
    result = {
        metric: test.accuracy,
        "loss": test.loss,
        f"val_{metric}": float(last[f"val_{metric}"]),
        "val_loss": float(last["val_loss"]),
        "rounds": int(last["round"]),
        "num_clients": config.num_clients,
        "seconds": seconds,
        "run_dir": str(folder.path),
        "model_sha256": state_sha256(state),
        "faults": safety.faults.report(),
        **({} if paths is None else paths.figures()),
        **more,
    }
    text = configuration.public_text(configuration.with_values(config.text, resume=None))
    folder.save_model(state, {"config": text, "classes": "\n".join(fed.dataset.classes)})
    if paths is not None:
        pool = config.resilience.pool
        resilience.save(folder.path, parts, paths, result["model_sha256"], pool)
    groups, classes = fed.dataset.counted
    counts = data.class_counts(groups, fed.parts, len(classes))
    data.write_class_counts(counts, classes, folder.path / "class_counts.csv")
    if config.run.plots:
        plots.draw_all(folder)
        decision_plots.draw(folder.path)
        mobility_plots.draw(folder.path, more.get("moves", ()), steps_of(config, fed))
        data.plot_class_counts(counts, classes, folder.path / "plots" / "class_counts.png")
    safety.faults.check_all_fired()
    result |= stages.current().figures()
    folder.finish(result)
    return result


class Judge:
    """Scores global models on parts that no client holds.

    Args:
        model: Receives each state that is to be scored; on the device where that is done.
        fed: The data.
        task: Tells loss and metric.
    """

    def __init__(self, model: nn.Module, fed: Federation, task: Task) -> None:
        self._model, self._fed, self._task = model, fed, task

    def validation(self, arrays: ArrayRecord) -> training.Score:
        """Score on the validation part, by which rounds are judged."""
        return self._score(arrays, self._fed.dataset.validation)

    def test(self, arrays: ArrayRecord) -> training.Score:
        """Score on the test part; once, at the end."""
        return self._score(arrays, self._fed.dataset.test)

    def paths(self, longest: int) -> PathScores | None:
        """Score every exit and every skip up to a length of the model that was scored last.

        On the validation part: one of them is chosen by its score. None if the model has none.
        """
        if not isinstance(self._model, ResilientModel):
            return None
        batches = data.eval_batches(self._fed.dataset.validation, self._fed.dataset)
        return measure(self._model, batches, longest)

    def whole(self, arrays: ArrayRecord) -> dict[str, Tensor]:
        """Return the state of a global model, also where only adapters of it are sent."""
        state = records.from_record(arrays)
        whole = self._model.state_dict() if lora.has_adapters(self._model) else state
        return {name: state.get(name, tensor.cpu()) for name, tensor in whole.items()}

    def _score(self, arrays: ArrayRecord, part: Images) -> training.Score:
        records.load_into(self._model, arrays, lora.sent(self._model))
        batches = data.eval_batches(part, self._fed.dataset)
        return training.evaluate(self._model, batches, self._task)

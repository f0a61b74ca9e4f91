"""Why a partition is the one that was chosen, in words that its figures bear out."""

from __future__ import annotations

from collections.abc import Iterator

from fedsys.partition.evaluation import RequestCost, evaluate
from fedsys.partition.planner import PartitionPlan, moved
from fedsys.partition.problem import Partition, Problem, taking_part
from fedsys.partition.solvers import broken


def reasons(problem: Problem, plan: PartitionPlan) -> str:
    """Return why: where the time goes, what each cut next to those chosen would change."""
    return "; ".join([_where(problem, plan), *_beside(problem, plan), _against(problem, plan)])


def _where(problem: Problem, plan: PartitionPlan) -> str:
    cost = plan.best.cost
    parts = {
        f"computing on {problem.hosts[p.host].name}": p.compute_s
        for p in cost.portions
        if p.compute_s
    }
    for t in cost.transfers:
        ends = f"{problem.hosts[t.first].name} to {problem.hosts[t.last].name}"
        parts[f"sending the tensor from {ends}"] = t.up_s
        parts[f"the latency from {ends} and back"] = t.latency_s
    waits = sum(p.wait_s for p in cost.portions) + sum(t.wait_s for t in cost.transfers)
    if waits:
        parts["waiting for other requests"] = waits
    name, seconds = max(parts.items(), key=lambda item: item[1])
    share = seconds / cost.latency_s if cost.latency_s else 0.0
    part, whole = milliseconds(seconds), milliseconds(cost.latency_s)
    return f"{name} takes most: {part} of {whole} ({share:.0%})"


def _beside(problem: Problem, plan: PartitionPlan) -> Iterator[str]:
    """Yield what moving each cut to the next legal one before and behind would change."""
    best, units = plan.best, len(problem)
    for host in list(taking_part(best.partition.cuts, units))[1:]:
        place = problem.cuts.index(best.partition.cuts[host - 1])
        told = []
        for step, word in ((-1, "earlier"), (1, "later")):
            if not 0 <= place + step < len(problem.cuts):
                continue
            other = _shifted(problem, best.partition, host, problem.cuts[place + step])
            if other is None:
                continue
            if broken(problem, other):
                told.append(f"one unit {word} breaks a constraint")
            else:
                told.append(f"one unit {word} {_change(best.cost, evaluate(problem, other), plan)}")
        after = problem.units[best.partition.cuts[host - 1] - 1] if place else "the input"
        if told:
            yield f"{problem.hosts[host].name} begins after {after}: {', '.join(told)}"


def _shifted(problem: Problem, partition: Partition, host: int, cut: int) -> Partition | None:
    """Return the partition with another cut; hosts between that compute nothing move along."""
    old, idle = partition.cuts[host - 1], partition
    for other in range(1, host):
        if idle.cuts[other - 1] == old:
            lower = moved(problem, idle, other, min(cut, old))
            idle = idle if lower is None else lower
    return moved(problem, idle, host, cut)


def _change(before: RequestCost, after: RequestCost, plan: PartitionPlan) -> str:
    computing = sum(p.compute_s for p in after.portions) - sum(p.compute_s for p in before.portions)
    sending = sum(t.up_s + t.latency_s for t in after.transfers)
    sending -= sum(t.up_s + t.latency_s for t in before.transfers)
    text = f"computes {_signed(computing)} and sends {_signed(sending)}"
    if plan.objective == "throughput":
        text += f", busiest {_signed(after.bottleneck_s - before.bottleneck_s)}"
    return text


def _against(problem: Problem, plan: PartitionPlan) -> str:
    whole = [
        f"{problem.hosts[host].name} {milliseconds(one.cost.latency_s)}"
        + (" (not allowed)" if host in plan.forbidden else "")
        for host, one in enumerate(plan.whole)
    ]
    return f"the whole model on one host: {', '.join(whole)}"


def milliseconds(seconds: float) -> str:
    """Return a duration for people, with three digits or more."""
    ms = 1e3 * seconds
    return f"{ms:,.0f} ms" if ms >= 1000 else f"{ms:.3g} ms"


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{milliseconds(abs(seconds))}"

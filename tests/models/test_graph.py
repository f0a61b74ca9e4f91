from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsys.errors import ModelError
from fedsys.models.graph import trace, trace_evaluation
from fedsys.models.layers import layered
from fedsys.randomness import Address, drawing, key_modules, seeded_default_generator


def made(build, seed=1):
    with seeded_default_generator(seed):
        return build()


def noise(*shape, seed=2):
    return torch.randn(*shape, generator=Address(seed).torch("test"))


class Functional(nn.Module):
    """Reads its mode in Python, in the ways people do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("scratch", torch.ones(6), persistent=False)

    def forward(self, x: Tensor, verbose: bool = False) -> Tensor:
        if verbose:
            print(x.shape)
        x = F.dropout(self.layer(x), 0.5, self.training)
        x = x * (2.0 if self.training else 1.0) + torch.tensor([1.0] * 6)
        return x + self.table * self.scratch


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class TwoPaths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.training else torch.sigmoid(torch.relu(x))


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([self.draw()])

    def draw(self) -> float:
        self.count = getattr(self, "count", 0) + 1
        return float(self.count)


class PartlyWithoutGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().mean()
        return x / scale


class PartlyInHalfPrecision(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x


class AutocastWhereItIs(nn.Module):
    """Switches autocast for a part, on whatever device its input is."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.layer, self.enabled = nn.Linear(6, 6), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, dtype=torch.bfloat16, enabled=self.enabled):
            y = x.float() @ x.float().mT
        result: Tensor = self.layer(y @ x)
        return result


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def both_modes(model, traced, x):
    for mode in (True, False):
        model.train(mode)
        traced.train(mode)
        with seeded_default_generator(5):
            expected = model(x)
        with seeded_default_generator(5):
            assert torch.equal(traced(x), expected)


def test_what_forward_reads_from_its_mode_follows_train_and_eval():
    model = made(Functional)
    both_modes(model, trace(model), noise(3, 6))


def test_the_names_their_order_and_the_tensors_are_those_of_the_model():
    model = made(Functional)
    traced = trace(model)
    assert list(traced.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert traced.state_dict(keep_vars=True)[name] is tensor


def test_tracing_leaves_the_model_alone():
    model = made(Functional)
    model.layer.eval()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    traced = trace(model)
    traced.eval()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.training and not trace(model).layer.training and trace(model).training


def test_modules_keep_paths_and_keyed_dropout_draws_under_its_own_name():
    model = key_modules(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5), nn.ReLU())))
    traced = trace(model)
    assert traced.get_submodule("1.0").name == "1.0"
    x = noise(4, 4)
    with drawing(Address(3), step=0, batch_size=4):
        expected = model(x)
    with drawing(Address(3), step=0, batch_size=4):
        assert torch.equal(traced(x), expected)


def test_stochastic_depth_of_torchvision_follows_the_mode():
    from torchvision.ops import StochasticDepth

    model = nn.Sequential(nn.Linear(4, 4), StochasticDepth(0.5, "row"))
    both_modes(model, trace(model.eval()), noise(8, 4))


def test_names_of_shared_modules_and_parameters_are_all_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    model.add_module("again", model[0])
    traced = trace(model)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert traced.get_submodule("2").weight is model[0].weight


def test_a_model_on_meta_is_traced_without_tensors():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    traced = trace(model)
    assert all(p.is_meta for p in traced.parameters())
    assert list(traced.state_dict()) == list(model.state_dict())


def test_a_traced_model_can_be_traced_again():
    model = made(Functional)
    both_modes(model, trace(trace(model)), noise(3, 6))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Branching(), r"in its forward, .*test_graph.py:\d+: `if x.sum\(\) > 0:`"),
        (nn.Sequential(nn.ReLU(), Branching()), r"in 1 \(Branching\), .*control flow"),
        (TwoPaths(), r"different things in training and in evaluation"),
        (nn.Sequential(nn.ReLU(), TwoPaths()), r"from 1 on"),
        (Random(), r"different constant tensor in every forward pass"),
        (PartlyWithoutGradient(), r"`scale = x.abs\(\).mean\(\)`: forward switches gradients"),
        (PartlyInHalfPrecision(), r"`return x @ x`: forward switches gradients or autocast"),
        (AutocastWhereItIs(enabled=True), r"`y = x.float\(\).*switches gradients or autocast"),
        (TwoInputs(), r"forward takes \(x, y\): it must take exactly one input"),
    ],
)
def test_what_cannot_be_traced_says_why_and_where(model, says):
    with pytest.raises(ModelError, match=says):
        trace(model)


def test_autocast_that_a_part_switches_off_where_it_is_off_is_no_step():
    before = torch.autocast.__init__
    traced = trace(model := AutocastWhereItIs(enabled=False))
    assert torch.autocast.__init__ is before
    both_modes(model, traced, noise(3, 6))
    assert torch.equal(trace_evaluation(copy.deepcopy(model))(noise(3, 6)), model(noise(3, 6)))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ModelError, match="autocast"):
        trace(model)  # there it would be a step


def test_a_model_that_cannot_be_copied_says_so():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        trace(model)


def test_other_threads_compute_while_a_model_is_traced():
    worker = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = noise(2, 4)
    expected = worker(x)
    stop = threading.Event()
    failures: list[str] = []

    def compute():
        while not stop.is_set():
            try:
                if not torch.equal(worker(x), expected):
                    failures.append("another result")
            except NameError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            trace(nn.Sequential(*(Functional() for _ in range(20))))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_a_graph_of_evaluation_writes_its_code_when_it_is_called_or_shown() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).eval()
    inputs = torch.randn(4, 3)
    assert torch.equal(trace_evaluation(model)(inputs), model(inputs))
    assert 'getattr(self, "0")' in trace_evaluation(model).code
    assert "def forward" in str(trace_evaluation(model))
    graph = trace_evaluation(model)
    graph(inputs)
    last = next(node for node in graph.graph.nodes if node.target == "1")
    last.replace_all_uses_with(last.args[0])
    graph.graph.erase_node(last)
    graph.recompile()
    assert '"1"' not in graph.code


class OfBuffers(nn.Module):
    """Computes with a buffer before the input comes into it; the buffer may change."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale.exp().sum()


def test_what_is_computed_of_buffers_alone_is_recorded_and_no_constant():
    """It was worked out when the model was traced: split models were refused, others kept it."""
    model = made(OfBuffers)
    traced = trace(model)
    model.scale.fill_(0.5)
    assert torch.equal(traced(noise(2, 4)), model(noise(2, 4)))
    with torch.device("meta"):
        assert len(layered(OfBuffers(), (4,))) == 1


class Counting(nn.BatchNorm2d):
    """A BatchNorm of its own class that counts its batches itself, as timm's."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )


def test_a_batchnorm_of_its_own_class_counts_its_batches_in_a_graph() -> None:
    """Fourteen of timm's models were refused for it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), Counting(2))
    graph, x = trace(copy.deepcopy(model)), noise(4, 1, 5, 5)
    for _ in range(2):
        assert torch.equal(graph.train()(x), model.train()(x))
    assert graph.state_dict()["1.num_batches_tracked"] == 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(graph.state_dict()[name], tensor)
    assert torch.equal(graph.eval()(x), model.eval()(x))


class Cropped(nn.Module):
    """Cuts its padding off again, by the size that it sees, and by its mode."""

    def forward(self, x):
        _, _, height, width = x.shape
        padded = F.pad(x, (0, 3, 0, 3))
        return padded[:, :, :height, : width - (1 if self.training else 2)]


def test_bounds_of_slices_may_be_sizes_and_may_follow_the_mode():
    """A slice with a size in it was taken for a constant of its mode: DaViT was refused."""
    model = Cropped()
    both_modes(model, trace(model), torch.randn(2, 3, 6, 6))

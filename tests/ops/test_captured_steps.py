"""A captured step follows the choice: replays take the one in force then. Without a GPU.

A dispatch mode stands for the capture of a CUDA graph: it keeps each kernel's call with its tensors and numbers, and a
replay makes the same calls on the same memory. What Python decided at the capture stays as it was, what lies in memory
is read again. The launches of the C++ nodes are captured in test_cuda_kernels.py.
"""

import pytest
import torch
from captures import capturing_on_the_host
from test_compiled import CHOICE, SPELLINGS, TWO, Calls, X
from torch.utils._pytree import tree_leaves

from nslightning import Jacobians, ops, patch, using
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection

OTHER = Jacobians(
    relu=0.7, relu6=TWO[::-1], leaky_relu=0.7, prelu=0.7, rrelu=0.7, hardtanh=TWO[::-1], clamp=TWO[::-1],
    hardswish=TWO[::-1], hardsigmoid=TWO[::-1], hardshrink=TWO[::-1], softshrink=TWO[::-1], threshold=0.7, elu=0.7,
    selu=0.7, abs=0.7, norm=0.7, hinge=0.7, max="sum", maximum="sum", max_pool="sum",
    scatter_max="sum", segment_max="sum", bag_max="sum",
)  # fmt: skip


@pytest.fixture
def capture(monkeypatch):
    return capturing_on_the_host(monkeypatch)


def gradients(model):
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    results = model(x)
    totals = [sum(t.sum() for t in tree_leaves(y) if t.is_floating_point()) for y in results]
    return [torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals]


# Fractional windows are drawn, or come as samples; what they gather is pooled as max_pool is.
@pytest.mark.filterwarnings("ignore:index_reduce.. is in beta")
@pytest.mark.parametrize("group", SPELLINGS)
def test_every_operation_takes_the_choice_of_the_replay(group, capture):
    model = Calls(list(SPELLINGS[group].values()))
    choices = (CHOICE, Jacobians(), OTHER, CHOICE)
    patch(model, CHOICE)
    want = []
    for choice in choices:
        with using(model, choice):
            want.append(gradients(model))
    graph, results = capture(lambda: gradients(model))
    for choice, expected in zip(choices, want, strict=True):
        with using(model, choice):
            graph.replay()
        for name, one, other in zip(SPELLINGS[group], results, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    assert not all(torch.equal(a, b) for a, b in zip(want[0], want[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(want[0], want[2], strict=True))


def test_the_rule_is_read_by_the_replay(capture):
    x, selection = torch.zeros(3, requires_grad=True), Selection(Jacobians(relu=0.5))
    g = torch.tensor([1.0, 2.0, 3.0])

    def step():
        return torch.autograd.grad(pointwise("relu", x, selection), x, g)[0]

    step()
    graph, result = capture(step)
    selection.set(Jacobians(relu=0.5, rule="published"))
    graph.replay()
    assert torch.equal(result, torch.full((3,), 0.5))
    selection.set(Jacobians(relu=0.5))
    graph.replay()
    assert torch.equal(result, 0.5 * g)


def test_a_call_that_names_its_choice_keeps_it(capture):
    x = torch.zeros(2, 2, requires_grad=True)
    graph, result = capture(
        lambda: torch.autograd.grad(ops.relu(x, 0.5).sum() + ops.amax(x, 1, jacobian="last").sum(), x)[0]
    )
    result.zero_()
    graph.replay()
    assert torch.equal(result, torch.tensor([[0.5, 1.5], [0.5, 1.5]]))


def test_what_a_capture_cannot_take_is_refused(capture):
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    selection = Selection(Jacobians(max_pool="minimal"))
    step = lambda: torch.autograd.grad(pool(x, selection, regular(2, 2)).sum(), x)  # noqa: E731 # one line reads better
    with pytest.raises(RuntimeError, match="run one step before the capture"):
        capture(step)
    step()
    with pytest.raises(RuntimeError, match="changes inside a captured step"):
        capture(lambda: selection.set(Jacobians(max_pool="last")))
    selection.set(Jacobians(max_pool="random"))
    with pytest.raises(RuntimeError, match="captured in a CUDA graph"):
        capture(step)


def test_a_switch_writes_the_numbers_that_change_and_no_others(capture):
    selection = Selection(Jacobians())
    x = torch.zeros(2, requires_grad=True)
    selection.meet(x)
    memory = selection.on(x.device)
    assert memory["relu"] is not selection.memory["relu"]
    versions = {name: tensor._version for name, tensor in memory.items()}
    with torch.inference_mode():
        selection.set(Jacobians(relu=1.0, max_pool="last"))
    for name, tensor in selection.memory.items():
        assert torch.equal(memory[name].nan_to_num(9.0), tensor.nan_to_num(9.0)), name
        assert memory[name]._version == versions[name]  # a graph may have saved it
    before = memory["relu"].data_ptr()
    selection.set(Jacobians())
    assert memory["relu"].item() == 0.0
    assert selection.on(x.device)["relu"].data_ptr() == before


@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd")  # it counts, and does not mind the arguments
def test_a_compiled_step_reads_the_memory_of_its_device(capture):
    """One graph serves every choice, though the numbers lie in memory that was made when it was traced."""
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Unflatten(1, (1, 2, 2)),
                                torch.nn.MaxPool2d(2))  # fmt: skip
    torch.nn.init.zeros_(model[0].weight)
    torch.nn.init.zeros_(model[0].bias)
    patch(model, Jacobians())
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
    x = torch.ones(1, 4)
    for choice in (
        Jacobians(),
        Jacobians(relu=1.0),
        Jacobians(relu=1.0, max_pool="minimal"),
        Jacobians(max_pool="last"),
    ):
        with using(model, choice):
            (got,) = torch.autograd.grad(compiled(x).sum(), model[0].bias)
            (want,) = torch.autograd.grad(model(x).sum(), model[0].bias)
        assert torch.equal(got, want)
    assert len(graphs) == 1


def counting(graphs):
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    return aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _: graph)

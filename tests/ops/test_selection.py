"""What a selection keeps and tells, asked for directly."""

import copy
import pickle

import pytest
import torch

from nslightning import Jacobians
from nslightning.ops.autograd.selection import Selection, fixed, guarded


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("constant", [False, True])
def test_a_copy_has_the_same_choice_and_memory_of_its_own(again, constant):
    selection = Selection(Jacobians(relu=0.25, max_pool=3.0), 7, constant=constant)
    copied = again(selection)
    assert (copied.jacobians, copied.seed, copied.constant) == (selection.jacobians, 7, constant)
    assert copied.at_kinks("relu") == (0.25,)
    copied.set(Jacobians(relu=0.75))
    assert selection.at_kinks("relu") == (0.25,)
    assert copied.memory["relu"] is not selection.memory["relu"]


def test_the_rule_is_the_one_of_the_choice_now_in_force():
    selection = Selection(Jacobians(relu=1.0))
    for rule in ("published", "exact", "published"):
        selection.set(Jacobians(relu=1.0, rule=rule))
        assert selection.read(".published", torch.ones(1)).item() == (rule == "published")


def test_streams_begin_at_their_seed_and_go_on():
    selection, cpu = Selection(Jacobians(relu="random"), 3), torch.device("cpu")
    draw = lambda: torch.rand(1, generator=selection.generator(cpu)).item()  # noqa: E731 # said often
    first, second = torch.rand(2, generator=torch.Generator().manual_seed(3)).tolist()
    assert draw() == first
    with selection.other_streams(4):
        assert draw() == torch.rand(1, generator=torch.Generator().manual_seed(4)).item()
    assert (selection.seed, draw()) == (3, second)
    selection.reseed(3)
    assert draw() == first


def test_a_constant_choice_is_read_as_a_replayed_backward_reads_it():
    torch.full((64,), 123.0)  # what an unfilled tensor might show
    for value in (0.25, 1.0):
        assert fixed("relu", value).read("relu", torch.ones(2, 3)).tolist() == [value]
    assert fixed("relu6", (0.25, 0.75)).read("relu6", torch.ones(2)).tolist() == [0.25, 0.75]
    assert fixed("relu", None).read("relu", torch.ones(2)).isnan().all()  # the reference
    varied = Selection(Jacobians(relu=0.5))
    assert varied.read("relu", torch.ones(2)).tolist() == [0.5]


@pytest.mark.parametrize(("choice", "refused"), [(None, False), (0.0, False), (0.5, True), (1.0, True)])
def test_a_guarded_result_refuses_another_choice(choice, refused):
    selection = Selection(Jacobians(relu=choice))
    x = torch.ones(3, requires_grad=True)
    y = guarded(x * 1, "relu", selection)
    if not refused:
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match=f"entries share memory, in place, .* given relu={choice}. Clone the tensor"):
        y.sum().backward()


@pytest.mark.parametrize("layout", ["sparse", "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_guarded_result_says_which_layout_it_has(layout):
    x = torch.ones(2, 3, requires_grad=True)
    y = x.to_sparse() if layout == "sparse" else torch.nested.as_nested_tensor([x[0], x[1]])
    guarded(y, "relu", Selection(Jacobians(relu=0.5)))
    said = r"layout torch.sparse_coo has .* Make the tensor dense" if layout == "sparse" else r"\(nested\) has .*dense"
    with pytest.raises(RuntimeError, match=said):
        y.backward(y.detach())

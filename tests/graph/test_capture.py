"""Capturing a model: parameters keep their sources, what cannot be re-traced is refused, nothing given is edited."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import flex_attention

from chipmunk_fx.graph.capture import Uncapturable, capture, dotted
from chipmunk_fx.graph.repeat import Repeating
from tests.graph.capturing import captured
from tests.runtime.models import Block, TinyDiT, calls, noise, words

CALL = calls([900])[0]


class Autocast(TinyDiT):
    enabled = True

    def forward(self, *args):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return super().forward(*args)


class NoAutocast(Autocast):
    enabled = False


class Nested(TinyDiT):
    def forward(self, *args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = super().forward(*args)
            with torch.autocast("cpu", enabled=False):
                y = x.float() @ torch.ones(x.shape[-1], x.shape[-1])
            return y + x @ x.mT @ x


class Flex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return flex_attention(q, k, v)


class Data(TinyDiT):
    def forward(self, latents, timestep, text):
        return super().forward(latents.data * 2, timestep, text)


class Buffered(TinyDiT):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Buffer(torch.ones(1))

    def forward(self, latents, timestep, text):
        return super().forward(latents * self.scale, timestep, text)


def test_inputs_keep_the_users_names_and_tell_parameters():
    model = Buffered()
    seen = captured(model, CALL[0], CALL[1], text=CALL[2])
    kept = {entry.name for entry in seen.capture.inputs if entry.is_parameter}
    assert kept == {name for name, _ in model.named_parameters()} | {"scale"}
    assert {entry.name for entry in seen.capture.inputs} - kept == {"latents", "timestep", "text"}


def test_parameters_keep_what_inductor_finds_them_by():
    seen = captured(TinyDiT(), *CALL)
    old = [n for n in seen.given.graph.nodes if n.op == "placeholder"]
    new = [n for n in seen.capture.module.graph.nodes if n.op == "placeholder"]
    assert len(old) == len(new) == len(seen.inputs)
    assert [n._dynamo_source for n in new] == [n._dynamo_source for n in old]
    static = [n.meta["tensor_dict"] for n in new if "_dynamo_static_input_type" in n.meta.get("tensor_dict", {})]
    assert len(static) == len(list(TinyDiT().parameters()))


def test_the_captured_graph_computes_the_same():
    model = TinyDiT()
    seen = captured(model, *CALL)
    with torch.no_grad():
        (result,) = seen.capture.module(*seen.inputs)
        torch.testing.assert_close(result, model(*CALL))


def test_the_given_graph_is_not_edited():
    for model in (TinyDiT(), Data()):
        before: list[str] = []
        after: list[str] = []

        def backend(module, inputs, before=before, after=after):
            before.append(module.print_readable(print_output=False))
            ids = [id(n) for n in module.graph.nodes]
            capture(module, inputs)
            after.append(module.print_readable(print_output=False))
            assert ids == [id(n) for n in module.graph.nodes]
            return module.forward

        torch._dynamo.reset()
        with torch.no_grad():
            result = torch.compile(model, backend=backend)(*CALL)
            torch.testing.assert_close(result, model(*CALL))
        assert before == after and len(before) == 1


def test_a_detached_input_is_captured():
    model = Data()
    seen = captured(model, *CALL)
    with torch.no_grad():
        torch.testing.assert_close(seen.capture.module(*seen.inputs)[0], model(*CALL))


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("model", [Autocast(), NoAutocast(), Nested()], ids=lambda model: type(model).__name__)
def test_autocast_in_the_graph_is_captured(model: nn.Module, around: bool):
    with torch.autocast("cpu", torch.bfloat16, enabled=around), torch.no_grad():
        seen = captured(model, *CALL)
        got, want = seen.capture.module(*seen.inputs)[0], model(*CALL)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    (result,) = next(iter(reversed(seen.capture.module.graph.nodes))).args[0]
    assert result.meta["val"].dtype == want.dtype
    assert sum(c.kind == "attention" and not c.reason for c in seen.candidates) == len(model.blocks)


def test_a_site_that_autocast_widens_is_refused():
    """As CUDA does in a region of fp32, which the CPU has not."""
    seen = captured(TinyDiT(), *CALL)
    mlp = next(c for c in seen.candidates if c.kind != "attention")
    mlp.anchor.meta["val"] = mlp.anchor.meta["val"].double()
    again = next(c for c in seen.candidates if c.anchor is mlp.anchor)
    assert not mlp.reason and "autocast makes torch.float64 of torch.float32" in str(again.reason)


def test_autocast_is_left_where_a_trace_ends_inside():
    class Half(Flex):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    with pytest.raises(Uncapturable):
        captured(Half(), torch.randn(1, 128, 32))
    graph = fx.Graph()
    graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    graph.output(graph.call_function(torch.ops.aten.mm.default, (torch.ones(2), 1)))
    with pytest.raises((RuntimeError, TypeError)):
        make_fx(Repeating(nn.Module(), graph).run, pre_dispatch=True)()
    assert not torch.is_autocast_enabled("cpu")


def test_flex_attention_is_refused():
    with pytest.raises(Uncapturable, match="flex_attention"):
        captured(Flex(), torch.randn(1, 128, 32))


def test_an_index_without_dimensions_is_named():
    class Looked(TinyDiT):
        def forward(self, latents, timestep, text=None):
            return super().forward(latents + torch.arange(1000)[timestep], timestep[None], text)

    with pytest.raises(Uncapturable, match=r"indexed by an integer tensor without dimensions.*table\[t\[None\]\]"):
        captured(Looked(), calls([900])[0][0], torch.tensor(900), None)


def test_sizes_are_dynamic_only_where_dynamo_made_them_so():
    assert not captured(TinyDiT(), *CALL).capture.dynamic
    seen = captured(TinyDiT(), *CALL, dynamic=True)
    assert seen.capture.dynamic
    text = seen.capture.inputs[seen.roles.text[0]].value
    assert isinstance(text.shape[1], torch.SymInt) and isinstance(text.shape[2], int)
    assert all(isinstance(n, int) for e in seen.capture.inputs if e.is_parameter for n in e.value.shape)


def test_a_copy_of_the_model_has_the_same_names():
    assert captured(copy.deepcopy(TinyDiT()), *CALL).names == captured(TinyDiT(), *CALL).names


def test_a_block_alone_is_captured():
    assert "qkv.weight" in captured(Block(), torch.randn(1, 16, 32)).names


def test_paths_are_spelled_as_the_user_does():
    assert dotted("L['self']._modules['blocks']._modules['0']._parameters['weight']") == "blocks.0.weight"
    assert dotted("L['kwargs']['hidden_states']") == "hidden_states"


def test_inputs_of_other_kinds_pass():
    class Sized(TinyDiT):
        def forward(self, latents, timestep, text, sizes):
            return super().forward(latents * len(sizes), timestep, text[0])

    seen = captured(Sized(), noise(), torch.ones(1), [words()], (16, 16))
    assert seen.role("latents") == "latents"


def test_second_names_of_an_op_become_the_first():
    class Named(nn.Module):
        def forward(self, x):
            y = torch.concat([x, torch.swapaxes(torch.multiply(x, x), 0, 1)])
            return torch.subtract(torch.concatenate([y, y], 1), 1)

    ops = {n.target for n in captured(Named(), torch.randn(4, 4)).capture.module.graph.nodes if n.op == "call_function"}
    aten = torch.ops.aten
    assert ops == {aten.cat.default, aten.transpose.int, aten.mul.Tensor, aten.sub.Tensor}

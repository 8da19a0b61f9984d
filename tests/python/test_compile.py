"""torch.library.opcheck and torch.compile(fullgraph=True) for every op."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import based_ops
from support import assert_close, expanded_dim, flatten, randn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

F32 = torch.float32
B, T, H, D, V, W, C, K = 2, 9, 2, 3, 4, 5, 6, 3
CU_SEQLENS = torch.tensor([0, 3, 3, T])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def sequence(op, batch=B, seqlen=T):
    """Inputs and options of a sequence op, without a state."""
    if op == "taylor_feature_map":
        return {"x": randn(batch, seqlen, H, D, dtype=F32)}
    if op == "linear_attention":
        q, k = randn(2, batch, seqlen, H, D, dtype=F32)
        return {"q": q, "k": k, "v": randn(batch, seqlen, H, V, dtype=F32)}
    if op == "sliding_window_attention":
        return dict(zip("qkv", randn(3, batch, seqlen, H, V, dtype=F32)))
    x, gate = randn(2, batch, seqlen, C, dtype=F32)
    weights = {"weight": randn(C, K, dtype=F32), "bias": randn(C, dtype=F32)}
    return {"x": x, "gate": gate, **weights}


OPTIONS = {"sliding_window_attention": {"window": W}, "short_conv": {"activation": "silu"}}
SEQUENCE_OPS = ["linear_attention", "sliding_window_attention", "short_conv"]
DECODE_OPS = [*SEQUENCE_OPS, "linear_attention_deferred"]


def call(op, inputs, **options):
    return getattr(based_ops, op)(**inputs, **OPTIONS.get(op, {}), **options)


def state_of(op, rows):
    """The final state of some other tokens."""
    return call(op, sequence(op, rows, 7), output_final_state=True)[1]


def decode_case(op):
    """A decode function, its tokens, and its states of 4 slots."""
    if op == "linear_attention_deferred":
        _, token, states = decode_case("linear_attention")
        states |= {
            "pending_k": randn(4, 3, H, D, dtype=F32),
            "pending_v": randn(4, 3, H, V).float(),
        }
        token["fill"] = torch.tensor([2, 0])
        return based_ops.linear_attention_decode_deferred, token, states
    state = state_of(op, 4)
    if op == "linear_attention":
        token = {n: x[:, 0] for n, x in sequence(op).items()}
        return based_ops.linear_attention_decode, token, dict(zip(("kv_state", "k_state"), state))
    if op == "sliding_window_attention":
        token = {n: x[:, 0] for n, x in sequence(op).items()} | {"positions": state[2][:B]}
        return based_ops.sliding_window_decode, token, {"k_cache": state[0], "v_cache": state[1]}
    inputs = sequence(op)
    token = inputs | {n: inputs[n][:, 0] for n in ("x", "gate")}
    return based_ops.short_conv_decode, token, {"conv_state": state}


# ---- opcheck -----------------------------------------------------------------------------------


def recorded_calls(function):
    """The torch ops of this library that a function runs, with their arguments."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "based_ops":
                calls.append((op, torch.utils._pytree.tree_map_only(torch.Tensor, clone, args)))
            return op(*args, **(kwargs or {}))

    def clone(x):
        return x.detach().clone().requires_grad_(x.requires_grad)

    with Record():
        function()
    return calls


def with_gradients(op, **options):
    """Forward and backward through the public function, every floating input a leaf."""
    inputs = sequence(op, batch=1 if "cu_seqlens" in options else B)
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    results = flatten(call(op, inputs, **options))
    sum(x.square().sum() for x in results if x.requires_grad).backward()


def opcheck_all(calls, names):
    assert [op._opname for op, _ in calls] == names
    for op, args in calls:
        differentiable = not any(n in op._opname for n in ("backward", "decode", "fold"))
        for x in torch.utils._pytree.tree_leaves(args):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_(differentiable)
        torch.library.opcheck(op, args)


def test_opcheck_taylor_feature_map():
    op = "taylor_feature_map"
    opcheck_all(recorded_calls(lambda: with_gradients(op)), [op, f"{op}_backward"])


@pytest.mark.parametrize("kind", ["plain", "state", "packed"])
@pytest.mark.parametrize("op", SEQUENCE_OPS)
def test_opcheck_sequence_op(op, kind):
    options = {}
    if kind != "plain":
        options = {"output_final_state": True, "initial_state": state_of(op, B)}
    if kind == "packed":
        options |= {"cu_seqlens": CU_SEQLENS, "initial_state": state_of(op, 3)}
    opcheck_all(recorded_calls(lambda: with_gradients(op, **options)), [op, f"{op}_backward"])


@pytest.mark.parametrize("op", DECODE_OPS)
def test_opcheck_decode(op):
    decode, token, states = decode_case(op)
    calls = recorded_calls(lambda: decode(**token, **states, state_indices=torch.tensor([3, -1])))
    opcheck_all(calls, [decode.__name__])


def test_opcheck_fold():
    _, token, states = decode_case("linear_attention_deferred")
    slots = torch.tensor([3, -1])
    calls = recorded_calls(
        lambda: based_ops.linear_attention_fold(**states, fill=token["fill"], state_indices=slots)
    )
    opcheck_all(calls, ["linear_attention_fold"])


# ---- torch.compile -----------------------------------------------------------------------------


# Sizes that are equal in the first call would be taken to be equal in every call.
SIZES = [(13, 9), (7, 30), (8, 17)]


def compare_compiled(op, inputs, compiled, **options):
    inputs = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    leaves = list(inputs.values())
    results = []
    for function in (call, compiled):
        outs = flatten(function(op, inputs, **options))
        wanted = [x for x in outs if x.requires_grad]
        grads = torch.autograd.grad(sum(x.square().sum() for x in wanted), leaves)
        results.append([*outs, *grads])
    assert_close(results[1], results[0], F32)


@pytest.mark.parametrize("kind", ["plain", "state", "packed"])
@pytest.mark.parametrize("op", SEQUENCE_OPS)
def test_compile_sequence_op(op, kind):
    """One graph for forward and backward, which also serves other sizes."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for batch, seqlen in SIZES:
        options = {}
        if kind == "state":
            options = {"output_final_state": True, "initial_state": state_of(op, batch)}
        if kind == "packed":
            cu_seqlens = torch.tensor([0, 3, *[seqlen] * batch])
            options = {"output_final_state": True, "cu_seqlens": cu_seqlens}
        inputs = sequence(op, 1 if kind == "packed" else batch, seqlen)
        compare_compiled(op, inputs, compiled, **options)
    assert backend.frame_count == 1


def test_compile_taylor_feature_map():
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        compare_compiled("taylor_feature_map", sequence("taylor_feature_map", *size), compiled)
    assert backend.frame_count == 1


def test_dynamic_feature_dim():
    """expanded_dim of a symbolic D."""
    compiled = torch.compile(
        based_ops.taylor_feature_map, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for dim in (3, 8, 16):
        x = randn(5, dim, dtype=F32)
        out = compiled(x)
        assert out.shape == (5, expanded_dim(dim))
        assert torch.equal(out, based_ops.taylor_feature_map(x))


@pytest.mark.parametrize("with_slots", [False, True])
@pytest.mark.parametrize("op", DECODE_OPS)
def test_compile_decode_in_place(op, with_slots):
    """Inductor updates the state itself: no copy of it, and the caller's tensor changes."""
    decode, token, states = decode_case(op)
    if with_slots:
        token["state_indices"] = torch.tensor([3, -1])
    else:
        states = {n: x[:B].clone() for n, x in states.items()}
    expected_states = {n: x.clone() for n, x in states.items()}
    expected = decode(**token, **expected_states)
    compiled = torch.compile(decode, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, **token, **states)
    assert torch.equal(out, expected)
    assert all(torch.equal(states[n], expected_states[n]) for n in states)
    # The graph is the op on its arguments: nothing allocated, nothing computed beside it.
    assert f"torch.ops.based_ops.{decode.__name__}.default(" in code
    assert "empty_strided_cpu(" not in code and "cpp_fused" not in code


def test_inductor_runs_all_sequence_ops():
    """Forward and backward of one function that uses every op, under the default backend."""

    def mixed(x, weight, k):
        q = based_ops.short_conv(x, weight, activation="silu", gate=x).unflatten(-1, (H, V))
        near = based_ops.sliding_window_attention(q, k, q, W)
        far, state = based_ops.linear_attention(q, k, near, output_final_state=True)
        return based_ops.taylor_feature_map(far), *state

    leaves = [randn(B, T, H * V), randn(H * V, K), randn(B, T, H, V)]
    leaves = [x.float().requires_grad_() for x in leaves]
    cotangents = [torch.randn_like(x) for x in mixed(*leaves)]
    results = []
    for function in (mixed, torch.compile(mixed, fullgraph=True)):
        outs = function(*leaves)
        results.append([*outs, *torch.autograd.grad(outs, leaves, cotangents)])
    assert_close(results[1], results[0], F32)


def test_export():
    class Step(torch.nn.Module):
        def forward(self, q, k, v):
            return based_ops.linear_attention(q, k, v, output_final_state=True)

    inputs = sequence("linear_attention")
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(
        Step(), (), inputs, dynamic_shapes={n: {1: seqlen} for n in inputs}
    )
    longer = sequence("linear_attention", seqlen=33)
    exported, expected = program.module()(**longer), Step()(**longer)
    assert all(torch.equal(a, b) for a, b in zip(flatten(exported), flatten(expected)))

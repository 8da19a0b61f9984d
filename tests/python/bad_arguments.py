"""Every bad argument of every op, and the error it must raise."""

import torch

from support import randn

F32 = torch.float32
B, T, H, D, V, W, C, K = 2, 5, 3, 4, 6, 8, 7, 3
EXPANDED = 15
SLOTS, CAPACITY = 4, 5


def arguments(op):
    """Valid arguments: every case changes some of them."""
    if op == "taylor_feature_map":
        return {"x": randn(B, T, D, dtype=F32)}
    if op == "linear_attention":
        q, k = randn(2, B, T, H, D, dtype=F32)
        state = randn(B, H, EXPANDED, V, dtype=F32), randn(B, H, EXPANDED, dtype=F32) ** 2
        return {"q": q, "k": k, "v": randn(B, T, H, V, dtype=F32), "initial_state": state}
    if op in ("linear_attention_decode", "linear_attention_decode_deferred"):
        q, k = randn(2, B, H, D, dtype=F32)
        token = {"q": q, "k": k, "v": randn(B, H, V, dtype=F32)}
        state = arguments("linear_attention_fold")
        if op == "linear_attention_decode":
            state = {n: state[n] for n in ("kv_state", "k_state", "state_indices")}
        return token | state
    if op == "linear_attention_fold":
        return {
            "kv_state": randn(SLOTS, H, EXPANDED, V, dtype=F32),
            "k_state": randn(SLOTS, H, EXPANDED, dtype=F32),
            "pending_k": randn(SLOTS, CAPACITY, H, D, dtype=F32),
            "pending_v": randn(SLOTS, CAPACITY, H, V, dtype=F32),
            "fill": torch.tensor([1, 4]),
            "state_indices": torch.tensor([2, 0]),
        }
    if op == "sliding_window_attention":
        q, k, v = randn(3, B, T, H, V, dtype=F32)
        state = *randn(2, B, W, H, V, dtype=F32), torch.tensor([3, 20])
        return {"q": q, "k": k, "v": v, "window": W, "initial_state": state}
    if op == "sliding_window_decode":
        q, k, v = randn(3, B, H, V, dtype=F32)
        caches = randn(2, SLOTS, W, H, V, dtype=F32)
        return {
            **{"q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1]},
            "positions": torch.tensor([3, 20]),
            "state_indices": torch.tensor([2, 0]),
        }
    if op == "short_conv":
        x, gate = randn(2, B, T, C, dtype=F32)
        return {
            **{"x": x, "gate": gate, "weight": randn(C, K, dtype=F32), "bias": randn(C, dtype=F32)},
            "initial_state": randn(B, C, K - 1, dtype=F32),
        }
    x, gate = randn(2, B, C, dtype=F32)
    return {
        **{"x": x, "gate": gate, "weight": randn(C, K, dtype=F32), "bias": randn(C, dtype=F32)},
        "conv_state": randn(SLOTS, C, K - 1, dtype=F32),
        "state_indices": torch.tensor([2, 0]),
    }


def strided(x):
    """Same shape and values, another stride in the last dim."""
    return torch.stack([x, x], -1)[..., 0]


def double(x):
    return x.double()


def half(x):
    return x.bfloat16()


def part(index, change):
    """Changes one tensor of a state."""
    return lambda state: tuple(change(x) if i == index else x for i, x in enumerate(state))


def packed(*cu_seqlens, dtype=torch.int64):
    """The first row alone, with these cu_seqlens, and no initial state."""
    in_time = {n: lambda x: x[:1] for n in ("q", "k", "v", "x", "gate")}
    return in_time | {"initial_state": None, "cu_seqlens": torch.tensor(cu_seqlens, dtype=dtype)}


# op, what changes, argument, expected, got. The tensors that make up a state have their own names.
TAYLOR = [
    ({"x": lambda x: x[0, 0, 0]}, "x", "shape (..., D)", "()"),
    ({"x": lambda x: x.int()}, "x", "float32, bfloat16", "int32"),
    ({"x": lambda x: x > 0}, "x", "float32, bfloat16", ""),
    ({"x": lambda x: x.cfloat()}, "x", "float32, bfloat16", ""),
    ({"x": strided}, "x", "contiguous last dim", "stride 2"),
    ({"x": lambda x: x[..., :0]}, "x", "feature_dim >= 1", "0"),
    ({"scale": 0.0}, "scale", "> 0", "0"),
    ({"scale": -0.5}, "scale", "> 0", "-0.5"),
    ({"scale": float("nan")}, "scale", "> 0", "nan"),
]
CU_SEQLENS = [
    ({"cu_seqlens": torch.tensor([0, T])}, "cu_seqlens", "batch 1", "2"),
    (packed(1, 3, T), "cu_seqlens", "first entry of 0", "1 at index 0"),
    (packed(-1, 3, T), "cu_seqlens", "first entry of 0", "-1 at index 0"),
    (packed(0, 4, 3, T), "cu_seqlens", "non-decreasing", "3 at index 2"),
    (packed(0, 3, T - 1), "cu_seqlens", f"T = {T}", f"{T - 1} at index 2"),
    (packed(0, 3, T + 1), "cu_seqlens", f"T = {T}", f"{T + 1} at index 2"),
    (packed(0, 2**40, T), "cu_seqlens", "", ""),
    (packed(), "cu_seqlens", "N+1 >= 1", "0"),
    (packed(0, T, dtype=F32), "cu_seqlens", "int32 or int64", "float32"),
    (packed(0, T, dtype=torch.int16), "cu_seqlens", "int32 or int64", ""),
    (packed([0, T]), "cu_seqlens", "shape (N+1,)", "(1, 2)"),
]
SLOT_INDICES = [
    ({"state_indices": torch.tensor([0, SLOTS])}, "state_indices", "slots = 4", "4 at index 1"),
    ({"state_indices": torch.tensor([-2, 0])}, "state_indices", "[-1, slots)", "-2 at index 0"),
    ({"state_indices": torch.tensor([2**40, 0])}, "state_indices", "[-1, slots)", "1099511627776"),
    ({"state_indices": torch.tensor([1, 1])}, "state_indices", "at most once", "1 at index 1"),
    ({"state_indices": torch.tensor([0.0, 1.0])}, "state_indices", "int32 or int64", "float32"),
    ({"state_indices": torch.tensor([0, 1, 2])}, "state_indices", "shape (B,) = (2,)", "(3,)"),
    ({"state_indices": torch.tensor([[0, 1]])}, "state_indices", "shape (B,)", "(1, 2)"),
]
LINEAR = [
    ({"q": lambda q: q[0]}, "q", "shape (B, T, H, D)", "(5, 3, 4)"),
    ({"q": lambda q: q.int()}, "q", "float32, bfloat16", "int32"),
    ({"q": strided}, "q", "contiguous last dim", "stride 2"),
    ({"k": strided}, "k", "contiguous last dim", "stride 2"),
    ({"v": strided}, "v", "contiguous last dim", "stride 2"),
    ({"k": lambda k: k[:, :4]}, "k", "(2, 5, 3, 4)", "(2, 4, 3, 4)"),
    ({"k": lambda k: k[..., :2]}, "k", "(2, 5, 3, 4)", "(2, 5, 3, 2)"),
    ({"k": lambda k: k[:, :, :1]}, "k", "(2, 5, 3, 4)", "(2, 5, 1, 4)"),
    ({"v": lambda v: v[:, :, :1]}, "v", "(2, 5, 3, *)", "(2, 5, 1, 6)"),
    ({"v": lambda v: v[0]}, "v", "shape (B, T, H, V)", "(5, 3, 6)"),
    ({"k": half}, "k", "dtype float32", "bfloat16"),
    ({"v": double}, "v", "dtype float32", "float64"),
    ({"q": lambda q: q[..., :0], "k": lambda k: k[..., :0]}, "q", "feature_dim >= 1", "0"),
    ({"v": lambda v: v[..., :0]}, "v", "head_dim >= 1", "0"),
    ({"scale": 0.0}, "scale", "> 0", "0"),
    ({"scale": float("nan")}, "scale", "> 0", "nan"),
    ({"initial_state": lambda s: s[:1]}, "initial_state", "(kv_state, k_state)", "1 items"),
    ({"initial_state": lambda s: s[0]}, "initial_state", "(kv_state, k_state)", "Tensor"),
    ({"initial_state": part(0, lambda x: None)}, "initial_kv_state", "all", "some"),
    ({"initial_state": part(1, lambda x: None)}, "initial_k_state", "all", "some"),
    ({"initial_state": part(0, lambda x: x[..., :5])}, "initial_kv_state", "15, 6)", "15, 5)"),
    ({"initial_state": part(0, lambda x: x[:1])}, "initial_kv_state", "(2, 3,", "(1, 3,"),
    ({"initial_state": part(1, lambda x: x[..., :14])}, "initial_k_state", "3, 15)", "3, 14)"),
    ({"initial_state": part(0, half)}, "initial_kv_state", "float32", "bfloat16"),
    ({"initial_state": part(1, double)}, "initial_k_state", "float32", "float64"),
    ({"initial_state": part(0, strided)}, "initial_kv_state", "contiguous last dim", "stride 2"),
    ({n: double for n in "qkv"}, "initial_kv_state", "float64", "float32"),
]
LINEAR_DECODE = [
    ({"q": lambda q: q[0]}, "q", "shape (B, H, D)", "(3, 4)"),
    ({"q": strided}, "q", "contiguous last dim", "stride 2"),
    ({"k": lambda k: k[..., :2]}, "k", "(2, 3, 4)", "(2, 3, 2)"),
    ({"v": lambda v: v[:, :1]}, "v", "(2, 3, *)", "(2, 1, 6)"),
    ({"v": half}, "v", "dtype float32", "bfloat16"),
    ({"kv_state": half}, "kv_state", "dtype float32", "bfloat16"),
    ({"kv_state": strided}, "kv_state", "contiguous last dim", "stride 2"),
    ({"kv_state": lambda s: s[:, :, :14]}, "kv_state", "3, 15, 6)", "(4, 3, 14, 6)"),
    ({"k_state": lambda s: s[:, :, :14]}, "k_state", "3, 15)", "(4, 3, 14)"),
    ({"k_state": lambda s: s[:3]}, "k_state", "slots", "3"),
    ({"state_indices": None}, "kv_state", "(2, 3, 15, 6)", "(4, 3, 15, 6)"),
    ({"scale": -1.0}, "scale", "> 0", "-1"),
]
PENDING = [
    ({"pending_v": half}, "pending_v", "dtype float32", "bfloat16"),
    ({"pending_v": lambda v: v[:, :2]}, "pending_v", "(4, 5, 3, ", "(4, 2, 3, 6)"),
    ({"pending_k": strided}, "pending_k", "contiguous last dim", "stride 2"),
    ({n: lambda x: x[:, :0] for n in ("pending_k", "pending_v")}, "pending_k", "C >= 1", "0"),
    ({"fill": torch.tensor([5, 0])}, "fill", "[0, C = 5)", "5 at index 0"),
    ({"fill": torch.tensor([0, -1])}, "fill", "[0, C = 5)", "-1 at index 1"),
    ({"fill": double}, "fill", "int32 or int64", "float64"),
    ({"scale": 0.0}, "scale", "> 0", "0"),
]
DEFERRED = [
    ({"pending_k": lambda k: k[..., :2]}, "pending_k", "(4, *, 3, 4)", "(4, 5, 3, 2)"),
    ({"fill": torch.tensor([3])}, "fill", "(2,)", "(1,)"),
]
FOLD = [
    ({"pending_k": lambda k: k[0]}, "pending_k", "shape (slots, C, H, D)", "(5, 3, 4)"),
    ({"pending_k": lambda k: k[..., :2]}, "kv_state", "3, 6, 6)", "(4, 3, 15, 6)"),
    ({"kv_state": half}, "kv_state", "dtype float32", "bfloat16"),
    ({"k_state": lambda s: s[:3]}, "k_state", "(4, 3, 15)", "(3, 3, 15)"),
    ({"state_indices": None}, "fill", "(4,)", "(2,)"),
]
WINDOW = [
    ({"q": lambda q: q[0]}, "q", "shape (B, T, H, V)", "(5, 3, 6)"),
    ({"q": strided}, "q", "contiguous last dim", "stride 2"),
    ({"k": lambda k: k[..., :2]}, "k", "(2, 5, 3, 6)", "(2, 5, 3, 2)"),
    ({"v": lambda v: v[..., :2]}, "v", "(2, 5, 3, 6)", "(2, 5, 3, 2)"),
    ({"v": lambda v: v[:, :, :1]}, "v", "(2, 5, 3, 6)", "(2, 5, 1, 6)"),
    ({"k": half}, "k", "dtype float32", "bfloat16"),
    ({n: lambda x: x[..., :0] for n in "qkv"}, "q", "head_dim >= 1", "0"),
    ({"window": 0, "initial_state": None}, "window", ">= 1", "0"),
    ({"window": -3, "initial_state": None}, "window", ">= 1", "-3"),
    ({"window": W + 1}, "initial_k_cache", "(2, 9, 3, 6)", "(2, 8, 3, 6)"),
    ({"scale": 0.0}, "scale", "> 0", "0"),
    ({"initial_state": lambda s: s[:2]}, "initial_state", "positions)", "2 items"),
    ({"initial_state": part(2, lambda x: None)}, "initial_positions", "all", "some"),
    ({"initial_state": part(1, lambda x: x[..., :5])}, "initial_v_cache", "6)", "5)"),
    ({"initial_state": part(0, lambda x: x[:1])}, "initial_k_cache", "(2, 8", "(1, 8"),
    ({"initial_state": part(0, half)}, "initial_k_cache", "float32", "bfloat16"),
    ({"initial_state": part(1, strided)}, "initial_v_cache", "contiguous last dim", "stride 2"),
    ({"initial_state": part(2, lambda x: x[:1])}, "initial_positions", "(2,)", "(1,)"),
    ({"initial_state": part(2, double)}, "initial_positions", "int32 or int64", "float64"),
    ({"initial_state": part(2, lambda x: -x)}, "initial_positions", ">= 0", "-3 at index 0"),
]
WINDOW_DECODE = [
    ({"q": lambda q: q[0]}, "q", "shape (B, H, V)", "(3, 6)"),
    ({"v": strided}, "v", "contiguous last dim", "stride 2"),
    ({"k": lambda k: k[..., :2]}, "k", "(2, 3, 6)", "(2, 3, 2)"),
    ({"k": half}, "k", "dtype float32", "bfloat16"),
    ({"k_cache": half}, "k_cache", "dtype float32", "bfloat16"),
    ({"k_cache": lambda s: s[:, 0]}, "k_cache", "(slots, W, H, V)", "(4, 3, 6)"),
    ({"v_cache": lambda s: s[:, :5]}, "v_cache", "(4, 8, 3, 6)", "(4, 5, 3, 6)"),
    ({n: lambda s: s[:, :0] for n in ("k_cache", "v_cache")}, "k_cache", "window >= 1", "0"),
    ({"state_indices": None}, "k_cache", "(2, *, 3, 6)", "(4, 8, 3, 6)"),
    ({"positions": torch.tensor([3])}, "positions", "(2,)", "(1,)"),
    ({"positions": torch.tensor([3, -1])}, "positions", ">= 0", "-1 at index 1"),
    ({"positions": double}, "positions", "int32 or int64", "float64"),
    ({"scale": 0.0}, "scale", "> 0", "0"),
    ({"rotary": (torch.ones(B, 4), torch.ones(B, 4))}, "cos", "2 R <= V", "8"),
    ({"rotary": (torch.ones(B, 2), torch.ones(B, 3))}, "sin", "(2, 2)", "(2, 3)"),
    ({"rotary": (torch.ones(3, 2), torch.ones(3, 2))}, "cos", "(2, *)", "(3, 2)"),
    ({"rotary": (torch.ones(B, 2), torch.ones(B, 2).half())}, "sin", "float32", "float16"),
    ({"rotary": (torch.ones(B, 2), None)}, "sin", "all tensors", "some"),
]
CONV = [
    ({"x": lambda x: x[0]}, "x", "shape (B, T, C)", "(5, 7)"),
    ({"x": strided}, "x", "contiguous last dim", "stride 2"),
    ({"gate": strided}, "gate", "contiguous last dim", "stride 2"),
    ({"gate": lambda g: g[:, :4]}, "gate", "(2, 5, 7)", "(2, 4, 7)"),
    ({"gate": half}, "gate", "dtype float32", "bfloat16"),
    ({"initial_state": lambda s: s[..., :1]}, "initial_state", "(2, 7, 2)", "(2, 7, 1)"),
    ({"initial_state": lambda s: s[:1]}, "initial_state", "(2, 7, 2)", "(1, 7, 2)"),
    ({"initial_state": half}, "initial_state", "dtype float32", "bfloat16"),
]
CONV_DECODE = [
    ({"x": lambda x: x[0]}, "x", "shape (B, C)", "(7,)"),
    ({"x": strided}, "x", "contiguous last dim", "stride 2"),
    ({"gate": lambda g: g[:1]}, "gate", "(2, 7)", "(1, 7)"),
    ({"conv_state": lambda s: s[..., :1]}, "conv_state", "7, 2)", "(4, 7, 1)"),
    ({"conv_state": half}, "conv_state", "dtype float32", "bfloat16"),
    ({"conv_state": strided}, "conv_state", "contiguous last dim", "stride 2"),
    ({"state_indices": None}, "conv_state", "(2, 7, 2)", "(4, 7, 2)"),
]
TAPS = [
    ({"weight": lambda w: w[:, :1]}, "weight", "K = 2..8", "1"),
    ({"weight": torch.zeros(C, 9)}, "weight", "K = 2..8", "9"),
    ({"weight": lambda w: w[:5]}, "weight", "(7, *)", "(5, 3)"),
    ({"weight": lambda w: w[:, None]}, "weight", "shape (C, K)", "(7, 1, 3)"),
    ({"weight": half}, "weight", "dtype float32", "bfloat16"),
    ({"weight": strided}, "weight", "contiguous last dim", "stride 2"),
    ({"bias": lambda b: b[:5]}, "bias", "(7,)", "(5,)"),
    ({"bias": double}, "bias", "dtype float32", "float64"),
    ({"bias": strided}, "bias", "contiguous last dim", "stride 2"),
    ({"activation": "relu"}, "activation", 'None or "silu"', "relu"),
]
CASES = {
    "taylor_feature_map": TAYLOR,
    "linear_attention": LINEAR + CU_SEQLENS,
    "linear_attention_decode": LINEAR_DECODE + SLOT_INDICES,
    "linear_attention_decode_deferred": LINEAR_DECODE + PENDING + DEFERRED + SLOT_INDICES,
    "linear_attention_fold": FOLD + PENDING[1:] + SLOT_INDICES,
    "sliding_window_attention": WINDOW + CU_SEQLENS,
    "sliding_window_decode": WINDOW_DECODE + SLOT_INDICES,
    "short_conv": CONV + TAPS + CU_SEQLENS,
    "short_conv_decode": CONV_DECODE + TAPS + SLOT_INDICES,
}


def changed(op, changes):
    """The valid arguments with these changes; functions apply to arguments that the op has."""
    result = arguments(op)
    for name, change in changes.items():
        if not callable(change):
            result[name] = change
        elif name in result:
            result[name] = change(result[name])
    return result

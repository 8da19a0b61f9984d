"""fp64 results that timed outputs are held against: sums over all pairs, written from the formulas.

The attentions are quadratic, one head and one block of queries at a time, so that T = 8192 fits;
where that takes too long, they run on a sample of the heads, and of the queries.
The pointwise ops and the decode steps take based_ops.reference on fp64 copies.
"""

import itertools

import torch

from registry import Implementation, as_tuple, with_backward


def taylor_weights(scores, visible):
    return (1 + scores + scores.square() / 2).masked_fill(~visible, 0)


def softmax_weights(scores, visible):
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def corner_heads(x):
    """The first head of the first row and the last of the last, (B, T, H, .) -> (1, T, 2, .)."""
    return torch.stack([x[0, :, 0], x[-1, :, -1]], 1)[None]


def attention(weights, q, k, v, dout=None, window=None, block=512, queries=None):
    """out, or (out, dq, dk, dv) for a dout; q, k (B, T, H, D), v and dout (B, T, H, V).

    out_t = sum_s w_ts v_s / sum_s w_ts over the s with 0 <= t - s < window (None: no bound),
    w = weights(scores, visible), scores = <q_t, k_s> / sqrt(D). With a list of queries, out has
    these tokens only.
    """
    batch, seqlen, nheads, feature_dim = q.shape
    if queries is not None:
        return (_some_queries(weights, q, k, v, queries),)
    results = [torch.empty(x.shape, dtype=torch.float64, device=x.device) for x in (v, q, k, v)]
    for b in range(batch):
        for h in range(nheads):
            qh, kh, vh = (x[b, :, h].double().requires_grad_(dout is not None) for x in (q, k, v))
            for start in range(0, seqlen, block):
                end = min(start + block, seqlen)
                first = 0 if window is None else max(0, start - window + 1)
                age = torch.arange(start, end, device=q.device)[:, None]
                age = age - torch.arange(first, end, device=q.device)
                visible = (age >= 0) & (age < (window or seqlen))
                scores = qh[start:end] @ kh[first:end].T * feature_dim**-0.5
                w = weights(scores, visible)
                out = w @ vh[first:end] / w.sum(-1, keepdim=True)
                results[0][b, start:end, h] = out.detach()
                if dout is not None:
                    out.backward(dout[b, start:end, h].double())
            if dout is not None:
                for result, x in zip(results[1:], (qh, kh, vh), strict=True):
                    result[b, :, h] = x.grad
    return tuple(results) if dout is not None else (results[0],)


def _some_queries(weights, q, k, v, queries):
    heads = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        scores = q[b, queries, h].double() @ k[b, :, h].double().T * q.shape[-1] ** -0.5
        positions = torch.tensor(queries, device=q.device)[:, None]
        w = weights(scores, torch.arange(q.shape[1], device=q.device) <= positions)
        heads.append(w @ v[b, :, h].double() / w.sum(-1, keepdim=True))
    return torch.stack(heads, 1).unflatten(1, (q.shape[0], -1)).transpose(0, 1)


def plain(run, backward=False):
    """run on fp64 copies of the inputs -> a tuple of its results; gradients too if `backward`."""
    work = with_backward(Implementation("fp64", run)) if backward else Implementation("fp64", run)

    def expected(*inputs):
        args = work.prepare(*(_widen(x) for x in inputs))
        return work.outputs(args, work.run(*args))

    return expected


def in_place(run, *states):
    """A decode step on fp64 copies -> its results and the states it updated, given by position."""

    def expected(*inputs):
        inputs = [_widen(x) for x in inputs]
        return *as_tuple(run(*inputs)), *(inputs[i] for i in states)

    return expected


def _widen(x):
    return x.to(torch.float64, copy=True) if x.is_floating_point() else x.clone()

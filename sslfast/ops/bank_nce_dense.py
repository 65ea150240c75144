"""bank_nce_dense: noise-contrastive loss of every query against the same bank rows, streamed."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sslfast.ops import _library

_op = torch.ops.sslfast.bank_nce_dense.default


def bank_nce_dense(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float = 0.07,
    loss: Literal["infonce", "nce"] = "infonce",
    z: float | Tensor = 1.0,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contrast every query with its own bank row against the whole bank, or against one list of rows for all.

    ``bank_nce(negatives="full")`` and ``"shared"`` run this op. With scores ``s_j = query . bank[j] / temperature`` and
    the positive's ``s_0``, over the rows j of the bank (``negatives=None``, K = N - 1) or of the list and the positive:

    - ``infonce``: ``logsumexp_j(s_j) - s_0``;
    - ``nce``: ``softplus(-u_0) + sum_j softplus(u_j)`` over the negatives, ``u = s - log(z K / N)``.

    The rows are streamed in tiles with a running log-sum-exp; loss and gradient come out of one pass, and no ``[B, N]``
    or ``[B, K]`` tensor exists. Results of the shards of a bank can be merged: a query whose ``index`` is -1 has no
    positive here and gets ``logsumexp_j(s_j)`` (``sum_j softplus(u_j)``) as its loss, and its derivative as gradient.

    CUDA: for a bank in bf16 or fp16 the products take query and weights in the bank's type and sum in fp32.

    Args:
        query: ``[V, B, D]`` fp32, fp64 for an fp64 bank; V views.
        bank: ``[N, D]`` fp32, bf16, fp16 or fp64.
        index: ``[B]`` int64, bank row of the positive, or -1.
        negatives: ``[K]`` int64 bank rows that every query is contrasted with; None: the whole bank.
        temperature: τ in [1e-30, 1e30]. For a learned one divide the query by it and pass 1.0.
        loss: "infonce" or "nce".
        z: normaliser of nce, above 0, float or 0-d floating tensor.
        exclude_self: leave out, for each sample, the entries of ``negatives`` that are its own row.

    Returns:
        ``(loss, lse)``, each ``[V, B]``: the loss in nats, differentiable in ``query``, and the log-sum-exp of all
        scores (detached).

    Raises:
        ValueError: an option out of range, tensors on different devices, a bank, ``z`` or
            ``temperature`` that requires a gradient.
        RuntimeError: wrong dtype or shape; on CPU also a row outside the bank (CUDA: a device trap).
    """
    _library.check_temperature("bank_nce_dense", temperature)
    if loss not in ("infonce", "nce"):
        raise ValueError(f'bank_nce_dense: loss must be "infonce" or "nce", got {loss!r}')
    _library.check_z("bank_nce_dense", z)
    tensors = {"query": query, "bank": bank, "index": index, "negatives": negatives}
    tensors["z"] = z if isinstance(z, Tensor) else None
    _library.check_arguments("bank_nce_dense", tensors, gradient=("query",))
    _library.check_memory("bank_nce_dense", query=query, z=tensors["z"])
    if isinstance(z, Tensor) and z.is_complex():
        raise ValueError(f"bank_nce_dense: z must be floating, got {z.dtype}")
    z_tensor, z_number = (z.detach().double(), 1.0) if isinstance(z, Tensor) else (None, z)
    return _library.scored(
        "bank_nce_dense", _op, query, bank, index, negatives, z_tensor, z_number, temperature, loss == "nce",
        exclude_self,
    )  # fmt: skip


def bank_nce_dense_reference(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    negatives: Tensor | None = None,
    temperature: float = 0.07,
    loss: Literal["infonce", "nce"] = "infonce",
    z: float | Tensor = 1.0,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same loss written out in torch, any float type, gradients by autograd: the specification."""
    num_rows = bank.shape[0]
    query, here = query.to(torch.promote_types(query.dtype, torch.float32)), index >= 0
    listed = torch.arange(num_rows, device=bank.device) if negatives is None else negatives
    own = listed == index[:, None]  # [B, K]
    scores = torch.einsum("vbd,kd->vbk", query, bank[listed].to(query.dtype)) / temperature
    positive = torch.einsum("vbd,bd->vb", query, bank[index.clamp_min(0)].to(query.dtype)) / temperature
    if negatives is not None:
        scores = scores.masked_fill(own & exclude_self, -torch.inf)
        extra = positive.masked_fill(~here, -torch.inf)
        lse = torch.cat((scores, extra[..., None]), dim=-1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    if loss == "infonce":
        return torch.where(here, lse - positive, lse), lse.detach()
    num_negatives = num_rows - 1 if negatives is None else len(listed)
    offset = log_z(z, query) + math.log(num_negatives / num_rows)
    terms = -logsigmoid(offset - scores)
    if negatives is None:
        terms = terms.masked_fill(own, 0.0)
    return terms.sum(-1) - torch.where(here, logsigmoid(positive - offset), 0.0), lse.detach()


def log_z(z: float | Tensor, query: Tensor) -> Tensor:
    """``log z`` in the type of ``query``, taken in fp64: z itself may be beyond fp32."""
    return torch.as_tensor(z, dtype=torch.float64, device=query.device).log().to(query.dtype)


@torch.library.register_fake("sslfast::bank_nce_dense")
def _(
    query: Tensor, bank: Tensor, index: Tensor, negatives: Tensor | None, z_tensor: Tensor | None, *_args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _library.check_same_device("bank_nce_dense", query=query, bank=bank, index=index, negatives=negatives, z=z_tensor)
    torch._check(bank.dim() == 2, lambda: f"bank_nce_dense: bank must have shape [N, D], got {list(bank.shape)}")
    torch._check(query.dim() == 3, lambda: f"bank_nce_dense: query must have shape [V, B, D], got {list(query.shape)}")
    torch._check(
        query.shape[2] == bank.shape[1],
        lambda: f"bank_nce_dense: query must have D={bank.shape[1]} columns like bank, got {query.shape[2]}",
    )
    shape = query.shape[:2]
    return (
        query.new_empty(shape),
        query.new_empty(shape),
        torch.empty_like(query, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, bank, z_tensor = inputs[0], inputs[1], inputs[4]
    _library.check_no_gradient("bank_nce_dense", bank=bank, z=z_tensor)
    _, lse, grad = output
    ctx.mark_non_differentiable(lse, grad)
    ctx.save_for_backward(grad)
    ctx.query = query  # of its values nothing is needed: it may change before the backward pass


def _backward(ctx: Any, grad_loss: Tensor, _grad_lse: Tensor, _grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    grad = _library.first_derivative("bank_nce_dense", grad, ctx.query)
    return (grad_loss[..., None] * grad, *(None,) * 8)


torch.library.register_autograd("sslfast::bank_nce_dense", _backward, setup_context=_setup_context)

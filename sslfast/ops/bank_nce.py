"""bank_nce: noise-contrastive loss and its gradient against a memory bank, in one pass over the rows."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sslfast.ops import _library
from sslfast.ops.bank_nce_dense import bank_nce_dense, bank_nce_dense_reference, log_z
from sslfast.ops.negative_rows import negative_rows, negative_rows_reference

_Loss = Literal["infonce", "nce"]
_Number = float | Tensor
_Pair = tuple[Tensor, Tensor]
_op = torch.ops.sslfast.bank_nce.default


def bank_nce(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Literal["sampled", "shared", "full"] | Tensor = "sampled",
    num_negatives: int = 32000,
    loss: Literal["infonce", "nce"] = "infonce",
    z: float | Tensor | None = None,
    exclude_self: bool = True,
    seed: int = 0,
    step: int | Tensor = 0,
    shard: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrast every query with its own bank row against K other rows, or against all of them.

    With scores ``s_k = query . bank[row_k] / temperature``, ``k = 0`` the positive ``bank[index]``, N bank rows:

    - ``infonce``: ``logsumexp(s_0 .. s_K) - s_0`` (van den Oord et al. 2018, eq. 4);
    - ``nce``: ``-log h(s_0) - sum_{k>=1} log(1 - h(s_k))`` with ``h = P / (P + K / N)`` and ``P = exp(s) / z``
      (Wu et al. 2018, eqs. 5 to 8; PIRL section 3.2). Equal to binary cross-entropy on ``s_k - log(z K / N)``.

    One pass over the rows gives loss and gradient for all views together; no ``[B, K, D]`` or ``[B, K]`` tensor exists.
    Neither query nor bank is normalised here. Gradient flows to ``query`` only and is computed in the forward pass, so
    the bank may change before the backward pass. What is not computed is an error: a second derivative by ``query``,
    forward mode (jvp), torch.func. NaN and infinite numbers give what they give in :func:`bank_nce_reference`.

    Args:
        query: ``[..., B, D]`` floating; leading dimensions are views scored against the same negatives. Half types are
            computed in fp32; fp64 needs an fp64 bank.
        bank: ``[N, D]`` fp32, bf16, fp16 or fp64; sums are fp32 (fp64 for fp64).
        index: ``[B]`` int64, bank row of the positive.
        temperature: τ in [1e-30, 1e30]. For a learned one divide the query by it and pass 1.0.
        negatives: the bank rows that a sample is contrasted with.
            "sampled": K rows drawn for each sample, exactly ``negative_rows(index, ...)`` (the papers' form).
            "shared": K rows drawn once for the batch, exactly ``negative_rows(index, ..., shared=True)``: matrix
            products, and K rows read instead of B K.
            "full": every row of the bank, K = N - 1, exact; nothing is drawn.
            int64 rows ``[K]`` or ``[B, K]``: scored as given.
        num_negatives: K for "sampled" and "shared"; ignored otherwise.
        loss: "infonce" or "nce".
        z: normaliser of nce, float or 0-d floating tensor (stays on the device). None: estimated from this batch,
            ``N * mean(exp(s))`` over all views, samples and K + 1 scores, at the cost of a second pass;
            exact for "full". Above 0: a tensor that is not is an error on the CPU and a NaN loss on CUDA.
        exclude_self: sampled negatives never hold the positive row; shared rows that are a sample's own are left out
            for that sample.
        seed, step: fix the draw together with ``index``; see :func:`sslfast.ops.negative_rows`.
        shard: ``(first, N)``: ``bank`` holds rows ``first ..`` of a bank of N rows; index and negatives are rows of
            the whole bank, and those of other shards are skipped. A query whose positive is in another shard gets
            ``logsumexp(s_k)`` (``sum softplus(u_k)``) of the rows here as its loss, -inf (0) where there are none.
            The parts of all shards merge: see ``sslfast/models/sharded_bank.py``.
            With "shared" on CUDA, one host sync.
        return_lse: also return ``logsumexp(s_0 .. s_K)`` (detached), from which :func:`estimate_z` computes Z.

    Returns:
        ``[..., B]`` fp32 loss per query in nats (fp64 for fp64), or ``(loss, lse)``.

    Raises:
        ValueError: an option out of range, tensors on different devices, a bank, ``z`` or
            ``temperature`` that requires a gradient.
        RuntimeError: wrong dtype or shape; on CPU also a row outside the bank (CUDA: a device trap).
    """
    negatives_tensor, z_tensor = _tensor_or_none(negatives), _tensor_or_none(z)
    tensors = {
        "query": query,
        "bank": bank,
        "index": index,
        "negatives": negatives_tensor,
        "step": _tensor_or_none(step),
        "z": z_tensor,
    }
    _library.check_arguments("bank_nce", tensors, gradient=("query",))
    is_sampled = negatives_tensor is None and negatives == "sampled" and z_tensor is None
    if not is_sampled or query.dim() != 3 or query.dtype not in (torch.float32, torch.float64):
        # Torch reads these before the op does.
        _library.check_memory("bank_nce", query=query, index=index, negatives=negatives_tensor, z=z_tensor)
    if not query.is_floating_point() or (z_tensor is not None and z_tensor.is_complex()):
        raise ValueError(f"bank_nce: query and z must be floating, got {query.dtype=} and {z=}")
    if bank.dim() != 2:
        raise ValueError(f"bank_nce: bank must have shape [N, D], got {list(bank.shape)}")
    if shard is not None:
        if not isinstance(shard, Sequence) or len(shard) != 2:
            raise TypeError(f"bank_nce: shard must be (first row, rows of the whole bank), got {shard!r}")
        _library.check_integers("bank_nce", **{"the first row of shard": shard[0], "the rows of shard": shard[1]})
    first_row, num_rows = (0, bank.shape[0]) if shard is None else shard
    mode, rows, num_negatives = _negatives(negatives, num_negatives, num_rows)
    _check(num_rows, temperature, mode, num_negatives, loss, z, exclude_self, seed)
    if shard is not None:
        _check_shard(bank, shard, loss, z)
    step_tensor, step_number = _library.step_arguments("bank_nce", step)
    if query.dim() < 2:
        raise ValueError(f"bank_nce: query must have shape [..., B, D], got {list(query.shape)}")
    flat = query if query.dim() == 3 else query.reshape(math.prod(query.shape[:-2]), *query.shape[-2:])
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    # Given rows are scored as given, and the whole bank holds each positive once.
    exclude_self = exclude_self and mode in ("sampled", "shared")
    if mode == "shared":
        draw: dict[str, Any] = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": seed, "step": step}
        try:
            rows = negative_rows(index, **draw, shared=True)
        except RuntimeError as error:
            raise _own_error(error, index, num_rows) from None
    dense = mode == "full" or (rows is not None and rows.dim() == 1)
    if dense and index.dtype != torch.int64:  # before torch compares it or takes True for row 1
        raise RuntimeError(f"bank_nce: index must be int64; convert it with .long(), got {index.dtype}")
    # To the dense op -1 is a query without a positive: out of its range, as it is out of this one's.
    positive = torch.where(index < 0, -2, index) if dense else index
    if shard is not None and dense:
        positive, rows, own_share = _dense_rows_of_shard(index, rows, first_row, bank.shape[0], num_rows)
        dense = rows is None or rows.dim() == 1
        # The op computes Z K / N from the K and N of its own arguments.
        z = (
            z
            if z is None
            else (z.detach().double() if isinstance(z, Tensor) else z) * (num_negatives / num_rows / own_share)
        )

    def run(query: Tensor, loss: _Loss, z: _Number) -> _Pair:  # names: annotations are evaluated in every call
        if dense:
            try:
                return bank_nce_dense(
                    query,
                    bank,
                    positive,
                    negatives=rows,
                    temperature=temperature,
                    loss=loss,
                    z=z,
                    exclude_self=exclude_self,
                )
            except RuntimeError as error:
                raise _own_error(error, index, num_rows) from None
        z_tensor, z_number = (z.detach().double(), 1.0) if isinstance(z, Tensor) else (None, z)
        return _library.scored(
            "bank_nce", _op, query, bank, index, rows, step_tensor, step_number, z_tensor, z_number,
            num_negatives if rows is None else rows.shape[1], temperature, loss == "nce", exclude_self, seed,
            first_row, num_rows,
        )  # fmt: skip

    if loss == "nce" and z is None:
        lse = run(flat.detach(), "infonce", 1.0)[1]
        z = estimate_z(lse, num_negatives=num_negatives, num_rows=bank.shape[0]) if lse.numel() else 1.0
    losses, lse = run(flat, loss, 1.0 if z is None else z)
    if query.dim() != 3:
        losses = losses.reshape(query.shape[:-1])
    return (losses, lse.reshape(query.shape[:-1])) if return_lse else losses


def estimate_z(lse: Tensor, *, num_negatives: int, num_rows: int) -> Tensor:
    """NCE's normaliser from one batch: ``Z = N * mean(exp(s))`` over samples and their K + 1 scores.

    Args:
        lse: any shape, ``logsumexp(s_0 .. s_K)`` per query, from ``bank_nce(..., return_lse=True)``.
        num_negatives: K. num_rows: N.

    Returns:
        0-d fp64 tensor on the device of ``lse``: exp(1 / τ) leaves fp32 below τ = 0.0113. Source: Wu et al.
        2018, section 3.2 (Monte Carlo estimate of Z).

    Raises:
        ValueError: no number in ``lse``, of which there is no mean.
    """
    if not lse.numel():
        raise ValueError(f"estimate_z: lse must hold at least one number, got shape {list(lse.shape)}")
    return lse.double().flatten().logsumexp(0).exp() * num_rows / (lse.numel() * (num_negatives + 1))


def bank_nce_reference(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    temperature: float = 0.07,
    negatives: Literal["sampled", "shared", "full"] | Tensor = "sampled",
    num_negatives: int = 32000,
    loss: Literal["infonce", "nce"] = "infonce",
    z: float | Tensor | None = None,
    exclude_self: bool = True,
    seed: int = 0,
    step: int | Tensor = 0,
    shard: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same loss written out in torch, any float type, gradients by autograd: the specification."""
    num_rows = bank.shape[0] if shard is None else shard[1]
    draw: dict[str, Any] = {"num_negatives": num_negatives, "num_rows": num_rows, "seed": seed, "step": step}
    if shard is not None:
        losses, lse = _shard_reference(
            query, bank, index, negatives, shard[0], draw, exclude_self, temperature, loss, z
        )
        return (losses, lse) if return_lse else losses
    if isinstance(negatives, Tensor):
        rows_BK = negatives.expand(index.shape[0], -1)
    elif negatives == "sampled":
        rows_BK = negative_rows_reference(index, **draw, exclude_self=exclude_self)
    else:
        rows = negative_rows_reference(index, **draw, shared=True) if negatives == "shared" else None
        flat = query.reshape(math.prod(query.shape[:-2]), *query.shape[-2:])
        own = exclude_self and rows is not None
        kwargs: dict[str, Any] = {"negatives": rows, "temperature": temperature, "exclude_self": own}
        if z is None:
            _, lse = bank_nce_dense_reference(flat.detach(), bank, index, **kwargs)
            count = num_rows - 1 if rows is None else len(rows)
            z = estimate_z(lse, num_negatives=count, num_rows=num_rows) if lse.numel() else 1.0
        losses, lse = bank_nce_dense_reference(flat, bank, index, **kwargs, loss=loss, z=z)
        losses = losses.reshape(query.shape[:-1])
        return (losses, lse.reshape(query.shape[:-1])) if return_lse else losses
    num_negatives = rows_BK.shape[1]
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    chosen_BKD = bank[torch.cat((index[:, None], rows_BK), dim=1)].to(query.dtype)
    scores = torch.einsum("...bd,bkd->...bk", query, chosen_BKD) / temperature
    lse = scores.detach().logsumexp(-1)
    if loss == "infonce":
        losses = scores.logsumexp(-1) - scores[..., 0]
    else:
        if z is None:
            z = num_rows * scores.detach().exp().mean()
        logits = scores - log_z(z, query) - math.log(num_negatives / max(num_rows, 1))
        losses = -logsigmoid(logits[..., 0]) - logsigmoid(-logits[..., 1:]).sum(-1)
    return (losses, lse) if return_lse else losses


def _shard_reference(
    query: Tensor, bank: Tensor, index: Tensor, negatives: str | Tensor, first_row: int, draw: dict[str, Any],
    exclude_self: bool, temperature: float, loss: str, z: float | Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every mode as one list of rows of the whole bank, of which those of other shards and excluded ones score -inf."""
    num_rows, left_out = draw["num_rows"], False
    if isinstance(negatives, Tensor):
        rows_BK = negatives.expand(index.shape[0], -1)
    elif negatives == "sampled":
        rows_BK = negative_rows_reference(index, **draw, exclude_self=exclude_self)
    else:
        left_out = exclude_self or negatives == "full"
        every = torch.arange(num_rows, device=index.device)
        shared = negatives == "shared"
        rows_BK = (negative_rows_reference(index, **draw, shared=True) if shared else every).expand(len(index), -1)
    num_negatives = num_rows - 1 if isinstance(negatives, str) and negatives == "full" else rows_BK.shape[1]
    ids = torch.cat((index[:, None], rows_BK), dim=1) - first_row
    here = (ids >= 0) & (ids < len(bank))
    here[:, 1:] &= ~(left_out & (rows_BK == index[:, None]))
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    scores = torch.einsum("...bd,bkd->...bk", query, bank[ids.clamp(0, len(bank) - 1)].to(query.dtype)) / temperature
    scores = scores.masked_fill(~here, -torch.inf)
    lse = scores.logsumexp(-1)
    if loss == "infonce":
        return torch.where(here[:, 0], lse - scores[..., 0], lse), lse.detach()
    assert z is not None
    logits = scores - log_z(z, query) - math.log(num_negatives / num_rows)
    positive = torch.where(here[:, 0], -logsigmoid(logits[..., 0]), 0.0)
    return positive - logsigmoid(-logits[..., 1:]).sum(-1), lse.detach()


def _negatives(negatives: str | Tensor, num_negatives: int, num_rows: int) -> tuple[str, Tensor | None, int]:
    """Mode, rows where given, and K."""
    if isinstance(negatives, Tensor):
        if negatives.dim() not in (1, 2):
            raise ValueError(f"bank_nce: negatives must have shape [K] or [B, K], got {list(negatives.shape)}")
        return "rows", negatives, negatives.shape[-1]
    if negatives not in ("sampled", "shared", "full"):
        raise ValueError(
            f'bank_nce: negatives must be "sampled", "shared", "full" or int64 rows [K] or [B, K], got {negatives!r}'
        )
    return negatives, None, num_rows - 1 if negatives == "full" else num_negatives


def _tensor_or_none(value: object) -> Tensor | None:
    return value if isinstance(value, Tensor) else None


def _own_error(error: RuntimeError, index: Tensor, num_rows: int) -> RuntimeError:
    """The error of an op that this one runs, about the arguments that this one was given."""
    op, colon, rule = str(error).partition(": ")
    if op not in ("bank_nce_dense", "negative_rows") or not colon:
        return error
    if rule.startswith("index must be in ["):  # to that op a row of another shard is -1
        outside = index[(index < 0) | (index >= num_rows)]
        rule = f"index must be in [0, {num_rows}), got {outside[0].item()}; these are rows of bank"
    return RuntimeError(f"bank_nce: {rule}")


def _dense_rows_of_shard(
    index: Tensor, rows: Tensor | None, first_row: int, held: int, num_rows: int
) -> tuple[Tensor, Tensor | None, float]:
    """Positives and listed rows as rows of the shard, and the K / N of the op's arguments."""
    elsewhere = torch.where((index >= 0) & (index < num_rows), -1, -2)  # -2: in no shard, which is an error
    positive = torch.where((index >= first_row) & (index < first_row + held), index - first_row, elsewhere)
    if rows is None:
        return positive, None, (held - 1) / held
    # host sync: the number of rows in this shard is a shape
    here = rows[(rows >= first_row) & (rows < first_row + held)] - first_row
    if bool(((rows < 0) | (rows >= num_rows)).any()):
        raise ValueError(
            f"bank_nce: negatives must be in [0, {num_rows}), got {rows.min().item()} to {rows.max().item()}"
        )
    if len(here):
        return positive, here, len(here) / held
    return positive, rows[:1].expand(len(index), 1), 1 / num_rows  # a row of another shard: none is scored


def _check_shard(bank: Tensor, shard: tuple[int, int], loss: str, z: float | Tensor | None) -> None:
    first_row, num_rows = shard
    if bank.shape[0] < 2 or not 0 <= first_row <= num_rows - bank.shape[0]:
        raise ValueError(
            f"bank_nce: {shard=} must be (first row, rows of the whole bank) with at least 2 rows here, "
            f"and bank has {bank.shape[0]}"
        )
    if loss == "nce" and z is None:
        raise ValueError("bank_nce: nce on a shard needs z: a single shard cannot estimate it")


def _check(
    num_rows: int,
    temperature: float,
    mode: str,
    num_negatives: int,
    loss: str,
    z: float | Tensor | None,
    exclude_self: bool,
    seed: int,
) -> None:
    _library.check_temperature("bank_nce", temperature)
    if loss not in ("infonce", "nce"):
        raise ValueError(f'bank_nce: loss must be "infonce" or "nce", got {loss!r}')
    if z is not None:
        _library.check_z("bank_nce", z)
    _library.check_seed("bank_nce", seed)
    if mode == "full":
        if num_rows < 2:
            raise ValueError(
                f"bank_nce: {loss} against the full bank needs at least 2 rows, got {num_rows}: a row that is compared "
                "with itself alone gives no gradient"
            )
        return
    _library.check_integers("bank_nce", num_negatives=num_negatives)
    if num_negatives < 1:
        raise ValueError(f"bank_nce: needs at least one negative per sample, got {num_negatives=}")
    if mode != "rows" and num_rows < (2 if exclude_self else 1):
        raise ValueError(
            f"bank_nce: drawing negatives needs at least 2 bank rows when exclude_self is True, got {num_rows}; "
            "give more rows, or explicit ones"
        )
    if mode != "rows" and num_rows < 2 and loss == "infonce":
        raise ValueError(
            f"bank_nce: infonce needs at least 2 bank rows, got {num_rows}: every draw is the positive, so the loss is "
            "log(K + 1) whatever the query"
        )


@torch.library.register_fake("sslfast::bank_nce")
def _(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    negatives: Tensor | None,
    step_tensor: Tensor | None,
    step: int,
    z_tensor: Tensor | None,
    *_args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options = {"negatives": negatives, "step": step_tensor, "z": z_tensor}
    _library.check_same_device("bank_nce", query=query, bank=bank, index=index, **options)
    torch._check(bank.dim() == 2, lambda: f"bank_nce: bank must have shape [N, D], got {list(bank.shape)}")
    torch._check(query.dim() == 3, lambda: f"bank_nce: query must have shape [V, B, D], got {list(query.shape)}")
    torch._check(
        query.shape[2] == bank.shape[1],
        lambda: f"bank_nce: query must have D={bank.shape[1]} columns like bank, got {query.shape[2]}",
    )
    return (
        query.new_empty(query.shape[:2]),
        query.new_empty(query.shape[:2]),
        torch.empty_like(query, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, bank, z_tensor = inputs[0], inputs[1], inputs[6]
    _library.check_no_gradient("bank_nce", bank=bank, z=z_tensor)
    _, lse, grad = output
    ctx.mark_non_differentiable(lse, grad)
    ctx.save_for_backward(grad)
    ctx.query = query  # of its values nothing is needed: it may change before the backward pass


def _backward(ctx: Any, grad_loss: Tensor, _grad_lse: Tensor, _grad_grad: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    grad = _library.first_derivative("bank_nce", grad, ctx.query)
    return (grad_loss[..., None] * grad, *(None,) * 14)


torch.library.register_autograd("sslfast::bank_nce", _backward, setup_context=_setup_context)

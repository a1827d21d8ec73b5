"""The loss of a packed batch: output head and cross-entropy over the labelled rows, in chunks.

Logits exist for one chunk of rows at a time and their gradient is taken on the spot, so memory does
not grow with tokens x vocabulary. The same chunk yields what the run wants to know about the
predictions (correctness, the probability of closing the chain of thought), and all sums stay on
the device in double precision where it has it.
"""

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import is_fake

from finetuning.data.token_table import NUM_SEGMENTS, NUM_THINKING_BUCKETS, Segment

# Of fp32 logits: large products on an accelerator (832 rows of Qwen3's vocabulary),
_CHUNK_BYTES = {"cuda": 1 << 29}
_BESIDE = 4  # tensors as large as the logits where two models are compared
_CACHE_BYTES = 2 << 20  # near the size of a core's cache elsewhere


@dataclass(frozen=True)
class LossSums:
    """Sums over the targets of one micro-batch, on its device; add them up, then divide.

    per_document: (D, 5 segments, 3) loss in nats, number correct (a tie for the top counts),
    number of targets. thinking_buckets: (10, 2) loss and targets by tenth of the chain of
    thought. premature_close: (2,) probability of `</think>` summed over thinking targets, and
    their number. divergence: (2,) KL(base‖this model) in nats summed over the targets, and their
    number; None where no base was given.
    """

    per_document: torch.Tensor
    thinking_buckets: torch.Tensor
    premature_close: torch.Tensor
    divergence: torch.Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What training minimises: Σ w · cross-entropy + kl_anchor · KL(base‖model), over the number of targets.

    w is `answer_weight` for the tokens of the answer and of the end, 1 elsewhere. What is shown as loss is
    the plain cross-entropy.
    """

    kl_anchor: float = 0.0
    answer_weight: float = 1.0

    def weights(self, segments: torch.Tensor) -> torch.Tensor | None:
        """(N,) fp32 of the targets; None where all are 1."""
        if self.answer_weight == 1:
            return None
        of_answer = (segments == Segment.ANSWER) | (segments == Segment.END)
        return torch.where(of_answer, self.answer_weight, 1.0)


CROSS_ENTROPY = Objective()


@dataclass(frozen=True)
class Anchor:
    """The base, with which a model is compared, or to which its training is held.

    rows: (N, H), the base's states that predict the targets. head_weight: (V, H), the base's; None: the
    model's own, which is frozen. weight: training minimises cross-entropy + weight · KL(base‖model).
    """

    rows: torch.Tensor
    head_weight: torch.Tensor | None = None
    weight: float = 0.0

    def logits(self, part: slice, head_weight: torch.Tensor) -> torch.Tensor:
        """(C, V) fp32; head_weight: the model's."""
        head = head_weight if self.head_weight is None else self.head_weight
        return _logits(self.rows[part].to(head.dtype), head)


def packed_loss(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    *,
    target_positions: torch.Tensor,
    labels: torch.Tensor,
    segments: torch.Tensor,
    document: torch.Tensor,
    num_documents: int,
    thinking_bucket: torch.Tensor,
    close_id: int,
    num_targets: int | torch.Tensor,
    scale: float | torch.Tensor = 1.0,
    anchor: Anchor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, LossSums]:
    """Cross-entropy of N targets: fp32 scalar `scale * sum / num_targets`, and its sums.

    hidden: (T, H), the decoder's output. head_weight: (V, H). target_positions, labels, segments,
    document, thinking_bucket: (N,) int64 on the device of `hidden`; positions are distinct, the
    bucket is -1 outside the chain of thought. close_id is the id of `</think>`; -1, if the tokenizer
    has none, leaves premature_close at 0 of 0. num_targets counts the whole optimizer step, on all
    ranks; it and scale may be fp32 scalars on the device, as a CUDA graph needs. Gradients reach
    `hidden`, and `head_weight` where it is trainable. No host sync.

    Targets of document `num_documents` are padding, for a constant N: whatever their label and
    position, which may repeat, they add nothing. anchor, weights (N,): of the `Objective`'s gradient.
    """
    real = document < num_documents
    loss, nll, correct, close = _HeadLoss.apply(
        hidden,
        head_weight,
        target_positions,
        labels,
        real,
        close_id,
        scale / num_targets,
        torch.is_grad_enabled(),
        anchor,
        weights,
    )
    with torch.no_grad():
        thinking = (
            (segments == Segment.THINKING) & real if close_id >= 0 else torch.zeros_like(real)
        )
        sums = LossSums(
            *_sums(nll, correct, segments, document, num_documents, thinking_bucket),
            premature_close=_weighted_sum(close, thinking),
        )
    return loss, sums


@torch.no_grad()
def divergence(rows: torch.Tensor, head_weight: torch.Tensor, base: Anchor) -> torch.Tensor:
    """(N,) fp32: KL(base‖model) = Σ p_base (log p_base − log p) of N predictions, nats; in chunks.

    rows: (N, H), the states that are tuned. Σ p_base · log p is taken as a whole, so equal states give 0.
    """
    found = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    step = compared_rows_per_chunk(head_weight.shape[0], rows.device.type)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            tuned = torch.log_softmax(_logits(rows[part].to(head_weight.dtype), head_weight), 1)
            kept = torch.log_softmax(base.logits(part, head_weight), 1)
            found[part] = (kept - tuned).mul_(kept.exp_()).sum(1)
    return found


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows of logits to hold at once: a multiple of 64 that suits the device's memory."""
    budget = _CHUNK_BYTES.get(device_type, _CACHE_BYTES)
    rows = budget // (4 * vocab_size) // 64 * 64
    return min(max(rows, 64), 4096)


def compared_rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """The same where the base's logits lie beside them."""
    return max(rows_per_chunk(vocab_size, device_type) // _BESIDE // 64 * 64, 64)


class _HeadLoss(torch.autograd.Function):
    """Linear head and cross-entropy; the gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        positions,
        labels,
        real,
        close_id,
        factor,
        with_gradient,
        anchor,
        weights,
    ):
        needs_hidden, needs_weight = (with_gradient and need for need in ctx.needs_input_grad[:2])
        with_gradient = needs_hidden or needs_weight
        chunks = _Chunks(weight, len(labels), with_gradient, compared=anchor is not None)
        nll = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        correct, close = torch.empty_like(nll), torch.empty_like(nll)
        # Padding has a row of its own after the last token, so the others are each written once.
        grad_rows = hidden.new_zeros(len(hidden) + 1, hidden.shape[1]) if needs_hidden else None
        places = torch.where(real, positions, len(hidden))
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), chunks.rows):
                part = slice(start, start + chunks.rows)
                rows = hidden.index_select(0, positions[part]).to(weight.dtype)
                outputs = nll[part], correct[part], close[part]
                error = chunks.error(rows, labels[part], close_id, outputs)
                if with_gradient and (weights is not None or anchor is not None):
                    own = None if weights is None else weights[part]
                    other = None if anchor is None else anchor.logits(part, weight)
                    error = _objective_error(error, labels[part], own, anchor, other)
                    del other
                if needs_hidden:
                    # Scaled after the product: H numbers a row instead of V.
                    gradient = _scaled(torch.mm(error, weight), factor)
                    grad_rows.index_copy_(0, places[part], gradient.to(hidden.dtype))
                if needs_weight:
                    rows = rows * real[part, None]
                    grad_weight.add_(_scaled(torch.mm(error.t(), rows), factor))
                del error  # before the next chunk has its logits
        nll.masked_fill_(~real, 0)
        ctx.save_for_backward(
            None if grad_rows is None else grad_rows[:-1],
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        ctx.mark_non_differentiable(nll, correct, close)
        return nll.sum(dtype=_wide(nll)).mul(factor).float(), nll, correct, close

    @staticmethod
    def backward(ctx, grad_loss, *_):
        gradients = (g if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return (*gradients, *[None] * 8)


class _Chunks:
    """From logits to the error of the predictions, chunk by chunk."""

    def __init__(
        self, weight: torch.Tensor, targets: int, with_gradient: bool, compared: bool
    ) -> None:
        self._weight, self._dtype, self._with_gradient = weight, weight.dtype, with_gradient
        self._by_kernel = _has_kernel(weight)
        sized = compared_rows_per_chunk if compared else rows_per_chunk
        most = sized(weight.shape[0], weight.device.type)
        if weight.is_cuda and not self._by_kernel:
            most = max(most // 128 * 64, 64)  # probabilities lie beside the logits
        # Chunks of about equal size: products with few rows are slow ones.
        number = max(1, math.ceil(targets / most))
        self.rows = min(most, max(64, math.ceil(targets / number / 64) * 64))
        shape = (0 if self._by_kernel else min(self.rows, targets), weight.shape[0])
        self._buffer = torch.empty(shape, dtype=torch.float32, device=weight.device)

    def error(self, rows, labels, close_id, outputs) -> torch.Tensor:
        """Fill the three outputs; softmax minus one-hot (C, V), in the weight's type for a gradient.

        The logits are made here, so that no caller's frame holds them when they are to go.
        """
        logits = _logits(rows, self._weight)
        if self._by_kernel:
            from finetuning.model.triton_kernels import softmax_error

            dtype = self._dtype if self._with_gradient else None
            return softmax_error(logits, labels, close_id, outputs, dtype)
        error = _softmax_error(logits, labels, close_id, *outputs, self._buffer[: len(labels)])
        del logits  # before there is a third tensor of their size
        return error.to(self._dtype) if self._with_gradient else error


def _objective_error(
    error: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    anchor: Anchor | None,
    base_logits: torch.Tensor | None,
) -> torch.Tensor:
    """From softmax − one-hot, in place, to w · (softmax − one-hot) + weight · (softmax − base's softmax).

    These are the gradients of the `Objective` by the logits. softmax = error + one-hot.
    """
    row = 1.0 if weights is None else weights.unsqueeze(1).to(error.dtype)
    if anchor is None:
        return error.mul_(row)
    at_label = error.new_full((len(labels), 1), anchor.weight)
    error.mul_(row + anchor.weight).scatter_add_(1, labels.unsqueeze(1), at_label)
    return error.sub_(torch.softmax(base_logits, 1).mul_(anchor.weight))


def _has_kernel(weight: torch.Tensor) -> bool:
    """Whether the softmax is a kernel of our own: half precision on CUDA, real tensors, Triton there."""
    half = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
    if not half or is_fake(weight):
        return False
    from torch.utils._triton import has_triton

    return has_triton()


def _scaled(product: torch.Tensor, factor: float | torch.Tensor) -> torch.Tensor:
    """product * factor; a scalar tensor would be rounded to the product's type before."""
    if isinstance(factor, torch.Tensor):
        return product.float().mul_(factor)
    return product.mul_(factor)


def _logits(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(C, V) fp32. CUDA keeps the products' fp32 sums instead of rounding them to bf16 first."""
    if rows.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(rows, weight.t(), out_dtype=torch.float32)
    return torch.mm(rows, weight.t()).float()


def _softmax_error(logits, labels, close_id, nll, correct, close, buffer) -> torch.Tensor:
    """Fill the three outputs for a chunk; return softmax minus one-hot, (C, V) fp32.

    The log of the normaliser comes from the largest probability, top - log p(top), which is exact
    to fp32 because p(top) is at least 1/V; so the exponentials are taken once.
    """
    target = labels.unsqueeze(1)
    top = logits.amax(1)
    label_logit = logits.gather(1, target).squeeze(1)
    probability = torch.softmax(logits, 1, out=buffer[: len(labels)])
    log_normaliser = top - probability.amax(1).log_()
    torch.sub(log_normaliser, label_logit, out=nll)
    torch.eq(label_logit, top, out=correct)
    close.copy_(probability[:, close_id])
    minus_one = probability.new_full((1, 1), -1.0).expand_as(target)
    return probability.scatter_add_(1, target, minus_one)


def _sums(nll, correct, segments, document, num_documents, thinking_bucket):
    """Sums by document and segment (D, 5, 3) and by thinking bucket (10, 2)."""
    measured = torch.stack((nll, correct, torch.ones_like(nll)), 1).to(_wide(nll))
    cells = measured.new_zeros((num_documents + 1) * NUM_SEGMENTS, 3)  # the last document: padding
    cells.index_add_(0, document * NUM_SEGMENTS + segments, measured)
    buckets = measured.new_zeros(NUM_THINKING_BUCKETS + 1, 2)  # the last row collects bucket -1
    buckets.index_add_(0, thinking_bucket % (NUM_THINKING_BUCKETS + 1), measured[:, ::2])
    return cells.view(-1, NUM_SEGMENTS, 3)[:num_documents], buckets[:NUM_THINKING_BUCKETS]


def _weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(2,) sum of weights * values, and sum of weights."""
    weights = weights.to(_wide(values))
    return torch.stack((torch.dot(values.to(weights.dtype), weights), weights.sum()))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    """Double precision for sums, except on Apple's GPU, which has none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64

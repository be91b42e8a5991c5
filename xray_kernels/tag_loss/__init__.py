"""Classification against several tags per sample, out of hundreds to a million: never the (B, V) logits.

    loss = mean over samples with tags of sum_t w_t (lse_i - z_it)
    z = features weight^T + bias,   w_t = 1 / (tags of sample i)

It is the cross-entropy of softmax(z) against a target that puts 1 / k on each of a sample's k tags, with the
linear layer inside: logits are computed for a chunk of the vocabulary at a time, and again in the backward
pass.
Source: Mahajan et al., "Exploring the limits of weakly supervised pretraining", ECCV 2018, section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xray_kernels import _checks, _library
from xray_kernels.tag_loss import reference
from xray_kernels.tag_loss.reference import LEAST_CHUNK, bytes_per_tag, wide_dtype

DEFAULT_WORKSPACE_BYTES = 64 * 2**20
"""What a chunk of logits may take by default: 64 MiB."""


def _fake_tag_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tags: Tensor,
    offsets: Tensor,
    tag_weights: Tensor | None,
    max_workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = features.new_empty((), dtype=torch.float64)
    return loss, loss.new_empty(features.shape[0]), loss.new_empty(tags.shape[0])


def _fake_backward(
    grad: Tensor,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tags: Tensor,
    offsets: Tensor,
    tag_weights: Tensor | None,
    lse: Tensor,
    picked: Tensor,
    max_workspace_bytes: int,
    features_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        features.new_empty(features.shape if features_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
        weight.new_empty(0 if bias is None else bias.shape[0]),
        features.new_empty(0) if tag_weights is None else tag_weights.new_empty(tag_weights.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.max_workspace_bytes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1], output[2])


def _backward(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    needs = ctx.needs_input_grad
    grads = _tag_loss_backward(grad, *ctx.saved_tensors, ctx.max_workspace_bytes, needs[0], needs[1])
    by_features, by_weight, by_bias, by_tag_weights = grads
    return (
        by_features if needs[0] else None,
        by_weight if needs[1] else None,
        by_bias if needs[2] else None,
        None,
        None,
        by_tag_weights if needs[5] else None,
        None,
    )


_tag_loss_backward = _library.define(
    "tag_loss_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor tags,"
    " Tensor offsets, Tensor? tag_weights, Tensor lse, Tensor picked, int max_workspace_bytes,"
    " bool features_grad, bool weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.tag_loss_backward,
    fake=_fake_backward,
)
_tag_loss = _library.define(
    "tag_loss(Tensor features, Tensor weight, Tensor? bias, Tensor tags, Tensor offsets, Tensor? tag_weights,"
    " int max_workspace_bytes) -> (Tensor, Tensor, Tensor)",
    reference=reference.tag_loss,
    fake=_fake_tag_loss,
    backward=_backward,
    setup_context=_setup,
)


def tag_loss(
    features: Tensor,
    weight: Tensor,
    tags: Tensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    tag_weights: Tensor | None = None,
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """Cross-entropy of a linear classifier against several tags per sample, a mean over samples with tags.

    Args:
        features: (B, F), float32, float16 or bfloat16, any strides; B may be 0.
        weight: (V, F), same dtype and device: a row for each tag of the vocabulary, as `nn.Linear` stores it.
        tags: (nnz,) int64 in 0..V-1: the tags of sample 0, then those of sample 1, and so on. A tag that a
            sample has twice counts twice.
        offsets: (B + 1,) int64: sample i has tags[offsets[i] : offsets[i + 1]]. Samples without tags weigh
            nothing; when no sample has tags the loss is 0 with zero gradients.
        bias: (V,) in the dtype of `weight`, or None.
        tag_weights: (nnz,), float32 or the dtype of `features`: the weight w_t of each entry of `tags`, taken
            as it is; 1 / k for a sample with k tags when None. Differentiable.
        max_workspace_bytes: bound on what is allocated besides the gradients, a float32 copy of
            half-precision features, and a few numbers for each sample and entry.

    Returns:
        The loss, a scalar, float32 for half-precision features.

    Raises:
        TypeError, ValueError, RuntimeError: a wrong type or dtype, shape or value, or device; the message
            names it.
        IndexError: a tag outside the vocabulary. `tags` and `offsets` are read on the CPU only and not under
            compilation: to read them on another device would wait for it. There a tag or entry out of range
            makes the loss NaN.
    """
    _check(features, weight, tags, offsets, bias, tag_weights, max_workspace_bytes)
    loss = _tag_loss(features, weight, bias, tags, offsets, tag_weights, max_workspace_bytes)[0]
    return loss.to(wide_dtype(features.dtype))


def _check(
    features: Tensor,
    weight: Tensor,
    tags: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    tag_weights: Tensor | None,
    max_workspace_bytes: int,
) -> None:
    _checks.check_tensor("features", features, layout="(B, F)")
    _checks.check_float("features", features)
    batch, width = features.shape
    _checks.check_tensor("weight", weight, layout="(V, F)")
    _checks.check_same("weight", weight, "features", features)
    _checks.check_shape("weight", weight, (weight.shape[0], width), "F of features")
    if weight.shape[0] == 0 or width == 0:
        raise ValueError(f"weight must have at least one tag and one feature, got {tuple(weight.shape)}")
    for name, indices, layout in (("tags", tags, "(nnz,)"), ("offsets", offsets, "(B + 1,)")):
        _checks.check_tensor(name, indices, layout=layout)
        if indices.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {indices.dtype}")
        _checks.check_same(name, indices, "features", features, dtype=False)
    _checks.check_shape("offsets", offsets, (batch + 1,), "one more than the rows of features")
    if bias is not None:
        _checks.check_tensor("bias", bias, layout="(V,)")
        _checks.check_same("bias", bias, "weight", weight)
        _checks.check_shape("bias", bias, (weight.shape[0],), "one value for each row of weight")
    if tag_weights is not None:
        _checks.check_tensor("tag_weights", tag_weights, layout="(nnz,)")
        _checks.check_same("tag_weights", tag_weights, "features", features, dtype=False)
        if tag_weights.dtype not in (torch.float32, features.dtype):
            raise TypeError(
                f"tag_weights must be float32 or the dtype of features ({features.dtype}), got {tag_weights.dtype}"
            )
        _checks.check_shape("tag_weights", tag_weights, tuple(tags.shape), "one weight for each entry of tags")
    least = min(LEAST_CHUNK, weight.shape[0]) * bytes_per_tag(batch, width, features.dtype)
    _checks.check_int("max_workspace_bytes", max_workspace_bytes, least, None, f"{LEAST_CHUNK} tags of {batch} samples")
    if tags.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(tags, offsets, weight.shape[0])


def _check_values(tags: Tensor, offsets: Tensor, num_tags: int) -> None:
    if offsets[0] != 0 or offsets[-1] != len(tags) or (offsets.diff() < 0).any():
        raise ValueError(
            f"offsets must rise from 0 to the {len(tags)} entries of tags and never fall, got {_brief(offsets)}"
        )
    if len(tags) > 0 and (tags.min() < 0 or tags.max() >= num_tags):
        wrong = tags[(tags < 0) | (tags >= num_tags)]
        raise IndexError(f"tags must be in 0..{num_tags - 1}, one of the rows of weight, got {_brief(wrong)}")


def _brief(values: Tensor) -> str:
    shown = ", ".join(str(value) for value in values[:8].tolist())
    return f"{shown}, ... ({len(values)} values)" if len(values) > 8 else shown

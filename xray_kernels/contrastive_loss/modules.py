"""`ClipLoss` and `SigLipLoss` with open_clip's signatures, and the gradients its code gives in every mode.

What each rank's `backward` gives after DDP's mean over W ranks, for open_clip's `ClipLoss` and for this one:

    local_loss  gather_with_grad   value            gradient of the towers                        of the scale
    True        True               rank's share     exact                                         exact
    False       True               global loss      exact                                         exact
    False       False              global loss      1 / W of it                                   exact
    True        False              rank's share     without what arrives at features as keys      exact
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from xray_kernels.contrastive_loss import DEFAULT_WORKSPACE_BYTES, compute
from xray_kernels.contrastive_loss.inputs import Call


def _default_group(world_size: int) -> Any:
    """The default process group, which must have `world_size` ranks; None for one process."""
    if world_size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"world_size is {world_size} but torch.distributed is not initialised; call init_process_group"
        )
    if dist.get_world_size() != world_size:
        raise ValueError(f"world_size must be that of the default group, {dist.get_world_size()}, got {world_size}")
    return dist.group.WORLD


class ClipLoss(nn.Module):
    """`clip_loss` behind the interface of `open_clip.loss.ClipLoss`, with the same values and gradients.

    On one process all modes are one. Over ranks, (local_loss, gather_with_grad) = (True, True) is `clip_loss`
    itself and the one to choose; the module's docstring says what the others give. The gradient of the scale
    is exact after the mean over ranks; a single rank's part of it may differ from open_clip's.

    Args:
        local_loss: return this rank's share of the loss; otherwise the loss of all ranks' pairs, on every
            rank.
        gather_with_grad: let gradients reach the features of other ranks.
        cache_labels: accepted and without effect: there are no labels to cache.
        rank: accepted and without effect: the process group knows it.
        world_size: ranks of the default process group; 1 stays on this process.
        use_horovod: refused.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks talk through torch.distributed only")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss; `{"contrastive_loss": loss}` with `output_dict`.

        Args:
            image_features, text_features, logit_scale, labels: as for `clip_loss`.
            logit_bias: shifts all logits alike, so it changes nothing; a tensor gets a zero gradient.

        Raises:
            TypeError, ValueError, RuntimeError: as for `clip_loss`; also a world_size that is not the default
                group's.
        """
        call = Call(
            "clip_loss",
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            labels,
            "all_gather",
            DEFAULT_WORKSPACE_BYTES,
        )
        loss = compute(call, _default_group(self.world_size), self.local_loss, self.gather_with_grad)[0]
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """`siglip_loss` behind the interface of `open_clip.loss.SigLipLoss`, with the same values and gradients.

    Args:
        cache_labels: accepted and without effect: there are no labels to cache.
        rank: accepted and without effect: the process group knows it.
        world_size: ranks of the default process group; 1 stays on this process.
        dist_impl: "bidir" (also when None) and "shift" send the texts round a ring, "reduce" and "gather"
            gather them.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        exchanges = {"bidir": "ring", "shift": "ring", "reduce": "all_gather", "gather": "all_gather"}
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in exchanges:
            raise ValueError(f"dist_impl must be one of {', '.join(exchanges)} or None, got {dist_impl!r}")
        self.exchange = exchanges[self.dist_impl]

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
        *,
        labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, over ranks this rank's share; `{"contrastive_loss": loss}` with `output_dict`.

        Args:
            image_features, text_features, logit_scale, logit_bias, labels: as for `siglip_loss`; a bias of None
                is none.

        Raises:
            TypeError, ValueError, RuntimeError: as for `siglip_loss`; also a world_size that is not the
                default group's.
        """
        call = Call(
            "siglip_loss",
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            labels,
            self.exchange,
            DEFAULT_WORKSPACE_BYTES,
        )
        loss = compute(call, _default_group(self.world_size))[0]
        return {"contrastive_loss": loss} if output_dict else loss

"""sinkattn with a cache of 8 bits, as a method of `sinkattn.evaluate.methods`, compared with full precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.evaluate.methods import Scores, Streamed
from sinkattn.ring_cache import CacheDtype


class EightBit(Streamed):
    """sinkattn with a cache of 8 bits, compared with one of full precision.

    Args:
        model: the model.
        whole: the same with a cache of full precision; it is fed first, the same tokens in each call.
        cache_dtype: of tokens that are not sinks.

    Attributes:
        divergences: KL divergence of each prediction from that of ``whole``, of the last call of `feed`: in nats, fp64
            ``[tokens]`` on the CPU.
    """

    divergences: Tensor

    def __init__(self, model: PreTrainedModel, whole: Streamed, cache_dtype: CacheDtype) -> None:
        super().__init__(model, whole.size, cache_dtype=cache_dtype)
        self.whole = whole
        self.keeps_logits = whole.keeps_logits = True

    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes all predictions."""
        scores = super().feed(ids, targets, wanted)
        pairs = zip(self.whole.kept_logits, self.kept_logits, strict=True)
        self.divergences = torch.cat([_divergences(*pair) for pair in pairs])
        return scores


@torch.inference_mode()
def _divergences(of: Tensor, by: Tensor) -> Tensor:
    """KL divergence, for each token, of the distribution of logits ``of`` from the one of logits ``by``."""
    log_q, log_p = (logits.float().log_softmax(dim=-1) for logits in (by, of))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1).double().cpu()

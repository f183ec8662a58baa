"""What tests of `generate` on continued streams share: models, and logits of a new stream to compare with."""

import hf_models
import torch
from hf_models import SIZES, build_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

S, W = 4, 28  # those of test_generate
FAMILIES = ["llama", "gpt2"]
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def enabled(family: str, headroom: int = 0):
    return hf_models.enabled(family, S, W, headroom)


@torch.no_grad()
def fresh(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last token of a new stream fed in one call; with a mask, of each row by itself without padding."""
    if mask is None:
        return model(ids).logits[:, -1]
    return torch.cat([model(ids[i : i + 1, mask[i].bool()]).logits[:, -1] for i in range(len(ids))])


class FedTokenCounter:
    """Counts the tokens per row that a decoder is fed, padding included."""

    def __init__(self, model):
        self.tokens = 0
        self.hook = model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        ids = args[0] if args else kwargs.get("input_ids")
        self.tokens += (kwargs["inputs_embeds"] if ids is None else ids).shape[1]

    def take(self) -> int:
        tokens, self.tokens = self.tokens, 0
        return tokens


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


def llava():
    pictures = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(**SIZES, num_key_value_heads=2)
    return build_model(LlavaForConditionalGeneration, LlavaConfig, vision_config=pictures, text_config=text, **PICTURES)


PICTURES = {"image_token_id": 96, "image_seq_length": 4}

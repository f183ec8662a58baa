"""Chat templates, and a tiny random model that chats in one."""

from __future__ import annotations

import copy

from hf_models import build

CHATML = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}<|begin|>system\nBe kind.<|end|>\n"
    "{% endif %}<|begin|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)
START_ONCE = (
    "<s>{% for message in messages %}<t>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}</t>\n{% endfor %}{% if add_generation_prompt %}<t>model\n{% endif %}"
)
# Of Gemma: no system prompt, and a user begins.
ALTERNATING = (
    "<s>{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|begin|>{{ message.role }}\n{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
# Of models that think: what was thought is left out once a question follows.
THINKING = (
    "{% for message in messages %}<|begin|>{{ message.role }}\n{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>')[-1] | trim }}{% else %}{{ message.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
# The system prompt is part of the first question.
SYSTEM_WITHIN = (
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for message in messages if message.role != 'system' %}<|begin|>{{ message.role }}\n"
    "{{ system if loop.first }}{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


def with_template(tokenizer, template):
    """A copy of a tokenizer with this chat template and its special tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.add_tokens(["<|begin|>", "<|end|>"], special_tokens=True)
    return changed


def tiny_model(tokenizer, **options):
    """A random model with the tokens of a tokenizer, which ends a text with the last of them."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 1024}
    model = build("llama", vocab_size=len(tokenizer), **{**sizes, **options})
    model.generation_config.eos_token_id = len(tokenizer) - 1
    return model

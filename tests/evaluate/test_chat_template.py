"""Chat templates taken apart: put together again, they are what the tokenizer writes."""

import copy

import pytest

from sinkattn.evaluate.chat_template import ChatTemplate

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
SPECIAL_LAST = (
    "{% for message in messages %}<u>{{ message.content }}{% if loop.last %}<last>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
NO_ASSISTANT = "{% for message in messages %}{% if message.role == 'assistant' %}{{ raise_exception('alone') }}"
NO_ASSISTANT += "{% endif %}{{ message.content }}{% endfor %}"


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", [CHATML, INST, START_ONCE], ids=["chatml", "inst", "start once"])
def test_parts_make_the_whole_chat(tokenizer, template):
    tokenizer = with_template(tokenizer, template)
    parts = ChatTemplate.of(tokenizer)
    messages, text = [], parts.start
    lead = " " if template is INST else ""
    for number in range(4):
        question, reply = f"question {number}", f"reply {number}"
        messages.append({"role": "user", "content": question})
        text += parts.asked(f"\n{question} ")
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
        messages.append({"role": "assistant", "content": reply})
        text += lead + reply + parts.end
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this model's tokenizer has no chat template"),
        (SPECIAL_LAST, "does not write every turn in the same way"),
        (NO_ASSISTANT, "takes no plain chat: alone"),
        ("nothing of what was said", "does not write every turn in the same way"),
    ],
)
def test_templates_that_cannot_be_continued_are_refused(tokenizer, template, message):
    with pytest.raises(ValueError, match=f"^chat: .*{message}"):
        ChatTemplate.of(with_template(tokenizer, template))

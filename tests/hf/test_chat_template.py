"""Chat templates taken apart: put together again, they are what the tokenizer writes."""

import pytest
from chat_models import CHATML, INST, START_ONCE, SYSTEM_WITHIN, with_template

from sinkattn.hf.chat.template import ChatTemplate

SPECIAL_LAST = (
    "{% for message in messages %}<u>{{ message.content }}{% if loop.last %}<last>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
NO_ASSISTANT = "{% for message in messages %}{% if message.role == 'assistant' %}{{ raise_exception('alone') }}"
NO_ASSISTANT += "{% endif %}{{ message.content }}{% endfor %}"
NO_SYSTEM = "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
NO_SYSTEM += "{% endif %}<u>{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "system"),
    [(CHATML, None), (CHATML, "Answer in verse."), (INST, None), (START_ONCE, None), (START_ONCE, "Answer in verse.")],
)
def test_parts_make_the_whole_chat(tokenizer, template, system):
    tokenizer = with_template(tokenizer, template)
    parts = ChatTemplate.of(tokenizer, system)
    messages, text = [{"role": "system", "content": system}] if system else [], parts.start
    lead = " " if template is INST else ""
    for number in range(4):
        question, reply = f"question {number}", f"reply {number}"
        messages.append({"role": "user", "content": question})
        text += parts.question(f"\n{question} ")
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        assert parts.asked(question) == parts.question(question) + parts.before_reply
        text += parts.before_reply
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text
        messages.append({"role": "assistant", "content": reply})
        text += lead + reply + parts.end
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "this model's tokenizer has no chat template"),
        (SPECIAL_LAST, None, "does not write every turn in the same way"),
        (NO_ASSISTANT, None, "takes no plain chat: alone"),
        (NO_SYSTEM, "Be brief.", "takes no system prompt: no system"),
        (SYSTEM_WITHIN, "Be brief.", "with a system prompt .* does not write every turn in the same way"),
        ("nothing of what was said", None, "does not write every turn in the same way"),
    ],
)
def test_templates_that_cannot_be_continued_are_refused(tokenizer, template, system, message):
    with pytest.raises(ValueError, match=f"^chat: .*{message}"):
        ChatTemplate.of(with_template(tokenizer, template), system)

"""Chat templates that behave like published ones, in our own words."""

from __future__ import annotations

CHATML = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s{{ m.content }}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n%s{%% endif %%}"
)
# Qwen2.5 begins with a system turn of its own.
QWEN2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
QWEN2 += CHATML % ("", "")
# Qwen3 puts an empty block of reasoning in front of the last answer, and of that one alone; its
# prompt ends with one where reasoning is switched off.
THINK = "<think>\n\n</think>\n\n"
QWEN3 = CHATML % (
    "{% if loop.last and m.role == 'assistant' %}" + THINK + "{% endif %}",
    "{% if enable_thinking is defined and enable_thinking is false %}" + THINK + "{% endif %}",
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

# Phi-3: the end of text wherever no answer is asked for.
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
# Phi-3, as first released: it has no place for a system turn.
PHI3_FIRST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>\n' + m['content'] + '<|end|>\n<|assistant|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)
LLAMA3_TURNS = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
)
LLAMA3_HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
# Llama 3, as first released: always ends with the header of an answer.
LLAMA3_FIRST = LLAMA3_TURNS + LLAMA3_HEADER
LLAMA3 = LLAMA3_TURNS + "{% if add_generation_prompt %}" + LLAMA3_HEADER + "{% endif %}"

# Llama 3.2: a system turn with today's date, or with a fixed one where there is no clock.
LLAMA32 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "    {%- else %}\n"
    '        {%- set date_string = "26 Jul 2024" %}\n'
    "    {%- endif %}\n{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content'] | trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}\n'
    "{%- for m in messages %}\n"
    "    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- m['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
# A clock with seconds that is asked without looking whether there is one.
CLOCK = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}\n" + CHATML % ("", "")

# LLaVA in transformers: the content of every turn is a list of parts, images first.
PARTS = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
    "{% endfor %}{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# Parts for the user, a string for the answer.
USER_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}"
    "{{ m.content[0]['text'] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

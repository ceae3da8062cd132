"""A conversation, and a template that writes it as ours does."""

from starlm.data.conversations import Message

SOURCE = """{{ bos_token }}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}<|user_start|>{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' -%}
{{- '' if loop.index0 and messages[loop.index0 - 1]['role'] == 'system' else '<|user_start|>' -}}
{{- message['content'] + '<|user_end|>' -}}
{%- else -%}<|assistant_start|>
{%- generation -%}{{ message['content'] + '<|assistant_end|>' }}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant_start|>{%- endif -%}"""
TALK = [
    Message("system", "Be brief."),
    Message("user", "\nHi"),
    Message("assistant", "Hello"),
    Message("user", "Bye"),
]

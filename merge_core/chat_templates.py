"""The chat templates a recipe may name: each writes one public prompt format, and says what ends a turn in it.

A template is Jinja as transformers renders it: `messages` (each with `role` and `content`), `add_generation_prompt`,
`bos_token`, `eos_token`.
"""

from __future__ import annotations

from typing import NamedTuple


class ChatTemplate(NamedTuple):
    """`text`, the template; `tokens`, the tokens it writes; `end`, that of them which ends the model's turn."""

    text: str
    tokens: tuple[str, ...] = ()
    end: str | None = None


_ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message.content + eos_token + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Response:\\n' }}{% endif -%}"""

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"""

_EXAONE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ '[|system|]' + message.content + '[|endofturn|]\\n' }}
{%- elif message.role == 'user' -%}
{{ '[|user|]' + message.content + '\\n' }}
{%- else -%}
{{ '[|assistant|]' + message.content + '[|endofturn|]\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '[|assistant|]' }}{% endif -%}"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}"""

_MISTRAL = """\
{{- bos_token -}}
{%- set wait = namespace(system='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set wait.system = message.content + '\\n\\n' -%}
{%- elif message.role == 'user' -%}
{{ '[INST] ' + wait.system + message.content + ' [/INST]' }}
{%- set wait.system = '' -%}
{%- else -%}
{{ ' ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}"""

CHAT_TEMPLATES = {
    "alpaca": ChatTemplate(_ALPACA),
    "chatml": ChatTemplate(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "exaone": ChatTemplate(_EXAONE, ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), "[|endofturn|]"),
    "llama3": ChatTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": ChatTemplate(_MISTRAL),
}

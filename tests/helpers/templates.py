"""Chat templates of several manners, small ones of our own, and damaged ones of which each loses something.

`FAMILIES` behave as families of models do; some of them lose what they have no place for. `DAMAGED` are
`WHOLE` with one change each, which must be found.
"""

from tests.helpers.qwen3_tokenizer import QWEN3_TEMPLATE

# Nothing is lost: system, tools, calls, answers of tools, reasoning of every turn.
WHOLE = """\
{%- if tools -%}{{- '<|im_start|>tools\\n' ~ (tools | tojson) ~ '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' -}}
{%- if m.reasoning_content or (loop.last and m.role == 'assistant') -%}
{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content -}}
{%- for c in m.tool_calls or [] -%}
{{- '<tool_call>\\n' ~ (c.function.name | tojson) ~ (c.function.arguments | tojson) ~ '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}
"""

_HEADERS = """\
{{- '<s>' -}}{%- for m in messages -%}
{{- '[' ~ (m.role if m.role != 'tool' else 'environment') ~ ']\\n' -}}
{%- if m.tool_calls -%}{{- 'CALL ' ~ (m.tool_calls[0].function | tojson) ~ '<|fim_pad|>' -}}
{%- else -%}{{- (m.content | trim) ~ '<|im_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[assistant]\\n' -}}{%- endif -%}
"""

_INSTRUCTIONS = """\
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' -%}
{{- '<s>' -}}{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- set last = messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 -%}
{{- '[INST] ' ~ (system if last else '') ~ m.content ~ ' [/INST]' -}}
{%- elif m.role == 'assistant' -%}{{- ' ' ~ m.content ~ '</s>' -}}
{%- elif not loop.first -%}{{- raise_exception('only user and assistant, please') -}}{%- endif -%}
{%- endfor -%}
"""

_ENDLESS = """\
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}{{- '<|' ~ m.role ~ '|>\\n' ~ m.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

_ALTERNATING = """\
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('roles must alternate') -}}
{%- endif -%}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_WITHOUT_TOOLS = """\
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' -}}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>model\\n' ~ (m.content | trim) ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>model\\n' -}}{%- endif -%}
"""

# What an answer thought is cut away, as in distilled models of the first generation.
_CUTTING = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- '<A>' ~ (m.content.split('</think>') | last) ~ '<|im_end|>' -}}
{%- elif m.role == 'tool' -%}{{- '<T>' ~ m.content ~ '</T>' -}}
{%- else -%}{{- '<U>' ~ m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<A><think>\\n' -}}{%- endif -%}
"""

CLOSING = WHOLE.replace(
    "assistant\\n<think>\\n' -}}{%- endif",
    "assistant\\n<think>\\n' ~ ('' if enable_thinking else '\\n</think>\\n\\n') -}}{%- endif",
)

FAMILIES = {
    "qwen3": QWEN3_TEMPLATE,
    "whole": WHOLE,
    "closing": CLOSING,
    "headers": _HEADERS,
    "instructions": _INSTRUCTIONS,
    "endless": _ENDLESS,
    "alternating": _ALTERNATING,
    "without tools": _WITHOUT_TOOLS,
    "cutting": _CUTTING,
}

_CONTENT = "{{- m.content -}}"
_THINK = "{{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n\\n' -}}"
_PROMPT = "assistant\\n<think>\\n' -}}{%- endif"
_ROLE = "{{- '<|im_start|>' ~ m.role ~ '\\n' -}}"
_LOOP = "{%- for m in messages -%}"
_SWAPPED = "{'user': 'assistant', 'assistant': 'user'}[m.role] if m.role in ('user', 'assistant')"

# Name: what stands in WHOLE, and what there is instead.
CHANGES = {
    "drops the system text": (_LOOP, "{%- for m in messages if m.role != 'system' -%}"),
    "drops answers of tools": (_LOOP, "{%- for m in messages if m.role != 'tool' -%}"),
    "drops earlier turns": (_LOOP, "{%- for m in messages[-4:] -%}"),
    "drops tools": ("(tools | tojson)", "''"),
    "shows the first tool only": ("(tools | tojson)", "(tools[0] | tojson)"),
    "drops the calls": ("m.tool_calls or []", "[]"),
    "shows the first call only": ("m.tool_calls or []", "(m.tool_calls or [])[:1]"),
    "drops names of calls": ("(c.function.name | tojson)", "''"),
    "drops arguments": ("(c.function.arguments | tojson)", "''"),
    "repeats the think block": (_THINK, _THINK + _THINK.replace("<think>", "\\n<think>")),
    "closes the think block": (_PROMPT, "assistant\\n<think>\\n\\n</think>\\n\\n' -}}{%- endif"),
    "drops reasoning after a while": (
        "(m.reasoning_content or '')",
        "(m.reasoning_content or '')[:9]",
    ),
    "drops reasoning after history": (
        "(m.reasoning_content or '')",
        "((m.reasoning_content or '') if loop.index0 < 3 else '')",
    ),
    "cuts the answer": (_CONTENT, "{{- m.content[:12] -}}"),
    "cuts the answer by one": (
        _CONTENT,
        "{{- m.content[:-1] if m.content | length > 9 else m.content -}}",
    ),
    "ends at the first blank line": (_CONTENT, "{{- m.content.split('\\n\\n')[0] -}}"),
    "escapes HTML": (_CONTENT, "{{- m.content | e -}}"),
    "escapes reasoning": ("(m.reasoning_content or '')", "((m.reasoning_content or '') | e)"),
    "writes on one line": (_CONTENT, "{{- m.content | replace('\\n', ' ') -}}"),
    "joins white space": (_CONTENT, "{{- m.content.split() | join(' ') -}}"),
    "drops marks": (_CONTENT, "{{- m.content | replace('**', '') -}}"),
    "writes small letters": (
        _CONTENT,
        "{{- m.content if m.content | length < 9 else m.content | lower -}}",
    ),
    "repeats the answer": (
        _CONTENT,
        "{{- m.content ~ m.content if loop.index0 > 1 else m.content -}}",
    ),
    "adds to long answers": (
        _CONTENT,
        "{{- m.content ~ ('!' if m.content | length > 12 else '') -}}",
    ),
    "swaps the roles": (_ROLE, _ROLE.replace("m.role", f"({_SWAPPED} else m.role)")),
    "swaps the roles of earlier turns": (
        _ROLE,
        _ROLE.replace("m.role", f"({_SWAPPED} and not loop.last and not loop.first else m.role)"),
    ),
    "turns the order round": (_LOOP, "{%- for m in messages[1::-1] + messages[2:] -%}"),
    "answers before it thinks": (_THINK, "{{- m.content -}}" + _THINK),
    "asks for something else": (_PROMPT, "assistant\\nWell: <think>\\n' -}}{%- endif"),
    "shows an earlier answer": (
        _CONTENT,
        "{{- messages[1].content if loop.last and loop.index0 > 2 else m.content -}}",
    ),
}
DAMAGED = {name: WHOLE.replace(*change) for name, change in CHANGES.items()}
assert WHOLE not in DAMAGED.values(), "a change that changes nothing"

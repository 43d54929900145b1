"""The chat template: how the turns of a chat become a context and its answer, in the infilling layout.

A question alone is the prompt itself, completed as `prepare_context` completes a text; the answer follows `sop` and
ends with `eop` (`{% generation %}` marks both for training):

    The capital of France is [MASK]. </s> sop Paris eop
    The opposite of hot is [gMASK] sop cold eop

What comes before the question stands as text in its context, a system turn in front of an empty line, earlier turns
behind their role:

    Be brief.

    User: The capital of France is ___.
    Assistant: Paris
    User: And of Spain?
    Assistant:[gMASK] sop Madrid eop

Only masks of the question are blanks; elsewhere in the context a mask is written `___`. With several masks in the
question, the answer fills the first `[MASK]`, as in the instructions that the model is trained on.
"""

# The two private characters are those that transformers' `sanitize_control_tokens` puts around a token of the user's
# that is to be read as text; such a mask is none.
CHAT_TEMPLATE = r"""
{%- macro unmarked(text) -%}
    {%- for part in ('\U000f0001' ~ text).split('\U000f0000') -%}
        {{- part.split('\U000f0001', 1)[-1] -}}
    {%- endfor -%}
{%- endmacro -%}
{%- set masks = [mask_token, smask_token, gmask_token] -%}
{%- set labels = {'user': 'User: ', 'assistant': 'Assistant: '} -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set last = turns | length - 1 -%}
{%- set question = last - last % 2 -%}
{%- set chat = namespace(context='') -%}
{%- if tools or documents -%}
    {{- raise_exception('tools and documents have no form in this chat template; write them into a turn as text') -}}
{%- elif not turns -%}
    {{- raise_exception('a chat must hold a turn of the user') -}}
{%- elif add_generation_prompt and last % 2 -%}
    {{- raise_exception("the chat ends in an answer; leave add_generation_prompt out, or add a user's turn") -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('the role of a turn must be system, user or assistant, got ' ~ message.role) -}}
    {%- elif message.content is not string or not message.content.strip() -%}
        {{- raise_exception('the content of every turn must be a text that is not empty') -}}
    {%- elif sop_token in unmarked(message.content) or eop_token in unmarked(message.content) -%}
        {{- raise_exception('no turn may hold ' ~ sop_token ~ ' or ' ~ eop_token ~ ', which are added here') -}}
    {%- endif -%}
{%- endfor -%}
{%- for turn in turns -%}
    {%- if turn.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('turns must alternate between user and assistant, beginning with the user') -}}
    {%- endif -%}
{%- endfor -%}
{%- for message in messages[: question + 1 if has_system else question] -%}
    {%- set text = namespace(plain=message.content) -%}
    {%- for mask in masks -%}
        {%- set text.plain = text.plain.replace(mask, '___') -%}
    {%- endfor -%}
    {%- if message.role == 'system' -%}
        {%- set chat.context = text.plain ~ '\n\n' -%}
    {%- else -%}
        {%- set chat.context = chat.context ~ labels[message.role] ~ text.plain ~ '\n' -%}
    {%- endif -%}
{%- endfor -%}
{%- set content = turns[question].content -%}
{%- set chat.context = chat.context ~ (labels['user'] if question else '') ~ content -%}
{%- set found = masks | select('in', unmarked(content)) | list -%}
{%- set rest = namespace(text=chat.context.replace(eos_token, '')) -%}
{%- for mask in found -%}
    {%- set rest.text = rest.text.replace(mask, '') -%}
{%- endfor -%}
{%- if found | length > 1 -%}
    {{- raise_exception('the question mixes ' ~ found | join(' and ') ~ '; use one kind of mask in one text') -}}
{%- elif not rest.text -%}
    {{- raise_exception('the question holds nothing but masks; give at least one token besides them') -}}
{%- elif not found -%}
    {%- set chat.context = chat.context ~ ('\nAssistant:' if question else '') ~ gmask_token -%}
{%- elif not (content.endswith(found[0]) or content.endswith(eos_token)) -%}
    {%- set chat.context = chat.context ~ eos_token -%}
{%- endif -%}
{{- chat.context -}}
{%- if add_generation_prompt -%}
    {{- sop_token -}}
{%- elif last % 2 -%}
    {%- if masks | select('in', unmarked(turns[last].content)) | list -%}
        {{- raise_exception('the answer, which is the last turn, must not hold a mask') -}}
    {%- endif -%}
    {{- sop_token -}}
    {%- generation -%}
        {{- turns[last].content ~ eop_token -}}
    {%- endgeneration -%}
{%- endif -%}
""".strip()

__all__ = ["CHAT_TEMPLATE"]

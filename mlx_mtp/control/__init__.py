"""Text under control: rules for what a row may say, worked out on the host from the row's own text.

row.py           the rules of a request, and of each of its rows (`decode.adjustments.RowControl`)
penalties.py     repetition, presence and frequency penalties, biases
grammar.py       JSON schemas, regular expressions and grammars, by llguidance (the extra `structured`)
tool_grammar.py  the grammar of Gemma 4's tool calls for declared tools
thoughts.py      where a thought begins and ends, and a budget for it
"""

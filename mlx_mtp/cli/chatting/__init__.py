"""The parts of `mlx-mtp chat`.

talk.py       the loop: a message in, an answer out, and what stays between them
commands.py   the lines that begin with /
lines.py      messages from a pipe or a plain terminal; editor.py from a terminal that can edit
screen.py     answers in a terminal; markdown.py draws Markdown as it streams, columns.py several answers
settings.py   /set: values as the command line takes them
store.py      files: saved conversations, the last one, the history of what was entered
attached.py   text files that go into a message
clipboard.py  /copy
"""

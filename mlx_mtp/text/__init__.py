"""Between text and tokens: tokenizers, chat templates, and what is read back from the tokens of an answer."""

"""Converts between text and tokens: tokenizers, chat templates, and parsing of generated answers."""

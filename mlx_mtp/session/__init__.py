"""From calls to rows and from rows to answers: options, the thread that owns a model, and what callers wait on."""

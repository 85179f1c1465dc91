"""An HTTP server with OpenAI's and Anthropic's interfaces, a thin skin over `api.MTPModel`.

    request --> guard.py, limits.py --> a translation (openai_*.py, anthropic_messages.py) --> service.Job
        service.py: a place, the model (registry.py), token ids --> rows of the model's running batch (`astream`)
    response <-- the translation: objects, or server-sent events <-- chunks

It owns no decoding state: batching, queueing, prefix caching and cancelling are the scheduler's. Needs the extra
`server`.
"""

"""What makes the embedded pair: data, tokeniser, models, training, export, evaluation (see train_demo_pair.py)."""

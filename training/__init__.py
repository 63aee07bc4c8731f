"""Training: what train.py is made of beside the algorithm. Nothing here knows an evaluation."""

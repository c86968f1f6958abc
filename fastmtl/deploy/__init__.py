"""What is trained, outside of the trainer: loaded, predicting, exported, described."""

"""HuBERT self-supervised pretraining and Japanese speech recognition."""

"""Checkpoint formats: bundles, Hugging Face, fairseq, torchaudio, s3prl and ONNX, one file per format."""

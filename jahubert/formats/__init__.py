"""Checkpoint formats (bundles, Hugging Face, fairseq, s3prl, torchaudio and ONNX), one file per format."""

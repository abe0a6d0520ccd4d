"""Passes that find attention by meaning and write it as the operator that ONNX Runtime runs fast."""

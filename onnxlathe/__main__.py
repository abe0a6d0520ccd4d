"""``python -m onnxlathe``."""

from .cli import main

main()

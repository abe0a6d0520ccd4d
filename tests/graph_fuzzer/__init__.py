"""Random ONNX graphs, biased so that passes act on them, and the judge that compares each pass's result in ORT.

``builder.py`` draws a graph with ``operators.py``, ``patterns.py`` and ``attention.py``; ``mutate.py`` turns patterns
into near misses; ``trials.py`` says which passes run with which options; ``judge.py`` decides whether they were right.
"""

"""Training of ONNX graphs in torch: the graph as a module, losses, the loop.

It imports torch, which takes seconds: import it inside the function that trains.
"""

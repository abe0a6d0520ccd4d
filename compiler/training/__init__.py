"""Training of ONNX graphs in torch: the graph as a module, losses, the loop. Imports torch, so nothing imports it early."""

"""C++/CUDA operators, built with ninja: not written yet. lcrnet/ops.py runs the readable twins and torchvision."""

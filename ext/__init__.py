"""C++/CUDA operators of LCR-Net. `build` compiles and finds them, `register` loads them into PyTorch; only
`lcrnet/ops.py` calls them. Imports nothing of ours.

schema.cpp      what operators there are
roi.h           geometry of regions, for CPU and CUDA
cpu/*.cpp       an operator on tensors; cpu/*.simd.cpp its loops, without torch, compiled once a machine level (level.h)
cuda/*.cu       an operator on tensors; cuda/*.cuh its kernels
"""

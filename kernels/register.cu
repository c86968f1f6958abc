// The CUDA kernels reach the dispatcher.
#include "../csrc/register.cpp"

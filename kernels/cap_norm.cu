// cap_norm on a GPU: a launch of one warp, or of one block where T is larger than a warp.
#include "../csrc/cap_norm.cpp"

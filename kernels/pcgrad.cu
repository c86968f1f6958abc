// PCGrad's weights on a GPU: one launch of one block, whose warps take a task each.
#include "../csrc/pcgrad.cpp"

// Gradient Vaccine's weights on a GPU: one launch, a block for each group of parameters, whose warps take a task each.
#include "../csrc/gradvac.cpp"
